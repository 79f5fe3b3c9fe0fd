"""Table `ppo_rates` from the metrics on disk: python reproduce/table_ppo_rates.py [PROFILE]

Its stage (`dvc repro`) also remakes the metrics where they are out of date.
"""

import sys

from fgalign.report.entry import table_entry

if __name__ == "__main__":
    sys.exit(table_entry("ppo_rates"))
