"""Table `judges` from the metrics on disk: python reproduce/table_judges.py [PROFILE]

Its stage (`dvc repro`) also remakes the metrics where they are out of date.
"""

import sys

from fgalign.report.entry import table_entry

if __name__ == "__main__":
    sys.exit(table_entry("judges"))
