"""Runs several training scripts one after the other in the processes of one launch: starting those costs the most.

Its argument is a JSON file: a list of a script's name and its arguments each.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from accelerate.state import PartialState

from tests.fresh import forget_accelerate

torch.set_num_threads(1)
# The processes stay connected from one run to the next: what starts them lets them meet once.
PartialState.destroy_process_group = lambda self, group=None: None
for name, arguments in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
    forget_accelerate()
    code = importlib.import_module(name).main(arguments)
    if code:
        sys.exit(code)
