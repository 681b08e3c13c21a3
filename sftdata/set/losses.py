"""Refuse a set that lost too much of its input."""

from __future__ import annotations

from collections import Counter

from sftdata.config import PrepareConfig
from sftdata.errors import DataError, no_rows
from sftdata.output import counted
from sftdata.set.ledger import DROPPED_NAME, REJECTS_NAME, Ledger, decode_rejects, first_reject
from sftdata.set.making import Making

# The fix for a set that lost all rows for one reason.
UNTRAINED_FIXES = {
    "formatter": "return more rows from the function of --formatter; None leaves one out.",
    "nothing-trained": "switch turns on in the data (weight, train);"
    " where none is switched off, --train-on all.",
    "over-long": "--overlong truncate, or a larger --max-length.",
    "overlong-picture": "a larger --max-length, or a smaller --max-pixels.",
    "no-trained-tokens": "a larger --max-length, or --overlong truncate-left, which keeps the ends.",
}


def refuse_losses(config: PrepareConfig, ledger: Ledger, build: Making) -> None:
    """Fail a run that lost too much; finished tasks stay for a resume.

    Raises:
        DataError: more rows rejected than `max_rejects` allows, or no trained token at all.
    """
    rejected, worst = sum(ledger.rows_rejected.values()), Counter(ledger.rows_rejected).most_common(3)
    share = config.max_rejects.removesuffix("%")
    allowed = float(share) / 100 * ledger.rows_in if share != config.max_rejects else float(share)
    codes = ", ".join(f"{count} {code}" for code, count in worst)
    if rejected > allowed:
        example = first_reject(decode_rejects(build.read(REJECTS_NAME).splitlines()), worst[0][0])
        without = f", or go on without them: --max-rejects {rejected}" if rejected < ledger.rows_in else ""
        raise DataError(
            f"{rejected:,} of {counted(ledger.rows_in, 'row')} rejected ({codes});"
            f" --max-rejects allows {config.max_rejects}. {example.place}: {example.reason.rstrip('.')}.",
            f"{example.fix.rstrip('.')}{without}. All are in {build.store}/{REJECTS_NAME};"
            f" sftdata explain {worst[0][0]}.",
        )
    if not ledger.rows_in:
        raise no_rows(config.inputs)
    if not ledger.tokens_trained:
        dropped = Counter(ledger.rows_dropped | ledger.rows_filtered).most_common(3)
        lost = ", ".join(f"{count} {reason}" for reason, count in dropped) or codes
        cut = bool(dropped) and bool(ledger.pictures_in) and dropped[0][0] == "no-trained-tokens"
        reason = "overlong-picture" if cut else dropped[0][0] if dropped else ""
        raise DataError(
            f"No token to train on: {counted(ledger.rows_in, 'row')} in, {lost or 'none of them kept'}.",
            f"{UNTRAINED_FIXES[reason]} All are in {build.store}/{DROPPED_NAME}."
            if dropped
            else f"see {build.store}/{REJECTS_NAME}.",
        )
