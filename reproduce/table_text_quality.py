"""Table `text_quality` from the metrics on disk: python reproduce/table_text_quality.py [PROFILE]

Its stage (`dvc repro`) also remakes the metrics where they are out of date.
"""

import sys

from fgalign.report.entry import table_entry

if __name__ == "__main__":
    sys.exit(table_entry("text_quality"))
