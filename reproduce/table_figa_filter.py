"""Table `figa_filter` from the metrics on disk: python reproduce/table_figa_filter.py [PROFILE]

Its stage (`dvc repro`) also remakes the metrics where they are out of date.
"""

import sys

from fgalign.report.entry import table_entry

if __name__ == "__main__":
    sys.exit(table_entry("figa_filter"))
