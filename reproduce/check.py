"""Compare rebuilt tables with the committed ones, cell by cell; exit 1 when a cell differs beyond its interval.

    python reproduce/check.py [--profile NAME] [--table NAME]... [--against REF] [--stage]

Rebuild first (`make reproduce`, or `dvc repro STAGE`); `make check TABLE=figa_main` does both. A table that was not
rebuilt here is the committed file itself: the report says so, and the exit status is 2.
"""

from __future__ import annotations

import argparse
import sys

from fgalign.config import load_profile
from fgalign.errors import FgalignError
from fgalign.report.check import (
    base_model_note,
    check_tables,
    committed_tables,
    format_report,
    left_out,
    not_rebuilt,
    passes,
    table_stage,
)


def main(arguments: list[str] | None = None) -> int:
    """Print the comparison; 0: every cell is exact or within its interval, 1: some differ, 2: cannot compare, or some
    table was not rebuilt here."""
    parser = argparse.ArgumentParser(description="Compare rebuilt tables with the committed ones, cell by cell.")
    parser.add_argument("--profile", help="profile to check (default: the selected one, else mini)")
    parser.add_argument(
        "--table",
        action="append",
        metavar="NAME",
        help="table to check; may be given again (default: all that the profile's own pipeline builds)",
    )
    parser.add_argument("--stage", action="store_true", help="only print the stages that build the tables")
    parser.add_argument("--against", default="HEAD", metavar="REF", help="commit with the tables to compare with")
    options = parser.parse_args(arguments)
    try:
        profile = load_profile(options.profile)
        names = options.table or committed_tables(profile, options.against)
        if options.stage:
            print(*(table_stage(profile, name) for name in names))
            return 0
        rows = check_tables(profile, names, options.against)
        same = not_rebuilt(profile, names, options.against)
    except FgalignError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(format_report(rows, names, same))
    others = [] if options.table else left_out(profile, options.against)
    if others:
        print(f"Not looked at, as another pipeline builds them: {', '.join(others)}; --table NAME checks one.")
    if not passes(rows) and (note := base_model_note(profile, options.against)):
        print(note)
    return 1 if not passes(rows) else 2 if same else 0


if __name__ == "__main__":
    sys.exit(main())
