"""The losses of documents that a run of training logged: how they are stored, and which stand out."""
