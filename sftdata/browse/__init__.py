"""A local page on which to look through finished sets: `sftdata browse`."""
