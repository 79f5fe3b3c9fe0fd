"""Table `edit_likelihood` from the metrics on disk: python reproduce/table_edit_likelihood.py [PROFILE]

Its stage (`dvc repro`) also remakes the metrics where they are out of date.
"""

import sys

from fgalign.report.entry import table_entry

if __name__ == "__main__":
    sys.exit(table_entry("edit_likelihood"))
