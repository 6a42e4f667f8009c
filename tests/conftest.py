"""What all tests share: the helper modules in this folder can be imported, and hypothesis draws the same everywhere."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # pytest's importlib mode leaves it alone

settings.register_profile("steady", deadline=None, derandomize=True)  # however busy the machine
settings.load_profile("steady")
