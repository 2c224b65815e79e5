"""torchdistill's loss classes, without what the whole package pulls in.

torchdistill requires torchvision, beside which `import lightning` fails here. Its losses need only torch, so the
package alone is laid into a folder that nothing else looks into, and one process can hold both sides.
"""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

REQUIREMENTS = Path(__file__).with_name("requirements.txt")
FOLDER = Path(__file__).resolve().parents[2] / "build" / "peers" / "torchdistill"


def torchdistill_losses(folder: Path = FOLDER) -> ModuleType:
    """Import `torchdistill.losses.mid_level`; fetch the pinned package, checked by sha256, where it is missing."""
    if not (folder / "torchdistill").is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
        subprocess.run([*install, "--target", str(folder), "-r", str(REQUIREMENTS)], check=True)
    sys.path.append(str(folder))
    try:
        return importlib.import_module("torchdistill.losses.mid_level")
    finally:
        sys.path.remove(str(folder))
