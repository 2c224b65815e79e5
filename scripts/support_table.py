"""Make docs/support.md of what `pytest -m support --support FILE` wrote.

python -m pytest -m support --support outcomes.json && python scripts/support_table.py outcomes.json
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lightning_opt.testing.support_table import claims_from, document  # noqa: E402


def main() -> int:
    """Write the document; exit code 1 where a marked test failed."""
    rows = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    (ROOT / "docs" / "support.md").write_text(document(claims_from(rows)), encoding="utf-8")
    failed = sorted({row["test"] for row in rows if row["outcome"] == "failed"})
    print("\n".join(f"failed: {test}" for test in failed) or f"docs/support.md: {len(rows)} marks")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
