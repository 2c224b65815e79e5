"""Turn numbers and foreign names into short, harmless text for reports, figures and terminals."""

import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

# Characters that a name has no use for: controls, format characters (bidirectional overrides, zero-width ones),
# lone surrogates and private use.
_UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
# A bare `token` is a secret, as is `hub.api_token`; `pad_token` and `cls_token` are words of a vocabulary.
_SECRET_KEY = (
    r"[\w.]*(?:password|passwd|secret|credentials?|(?:api|access|private|secret)_?key)"
    r"|(?:[\w.]*\.)?(?:(?:\w*_)?(?:api|auth|access|hub|hf|bearer|refresh|session|bot|github|gitlab|wandb|write|read)_)?token"
)
_SECRET_TEXT = re.compile(
    rf"""((?<![\w.])(?:{_SECRET_KEY})(?:\s*=\s*|["']\s*:\s*))("[^"]*"|'[^']*'|[^\s,}}\]"']+)""", re.IGNORECASE
)
_SECRET_WORD = re.compile(rf"[-+~]*(?:{_SECRET_KEY})=", re.IGNORECASE)
_SECRET_VARIABLE = re.compile(
    r"passw(?:or)?d|secret|credential|(?:^|_)(?:token|api_?key|key|auth|pat)s?$", re.IGNORECASE
)
_URL_USER = re.compile(r"(?<=://)[^/\s@'\"]+@")
_MASK = "***"
DASH = "–"


def plain(text: object, *, limit: int | None = None) -> str:
    r"""Make a foreign name fit for one line: printable characters only, single spaces, shortened in the middle.

    >>> plain("a\nb\u202ec", limit=10)
    'a bc'
    >>> plain("model_with_a_long_name", limit=11)
    'model…_name'
    """
    words = "".join(
        " " if char.isspace() else char
        for char in str(text)
        if char.isspace() or unicodedata.category(char) not in _UNPRINTABLE
    )
    words = " ".join(words.split())
    if limit is None or len(words) <= limit:
        return words
    tail = (limit - 1) // 2
    return words[: limit - 1 - tail] + "…" + words[len(words) - tail :]


def code(text: object) -> str:
    """Make foreign lines of code printable: no control characters but the line break, no empty lines."""
    lines = (_printable(line).rstrip() for line in str(text).splitlines())
    return "\n".join(line for line in lines if line)


def _printable(line: str) -> str:
    return "".join(" " if char == "\t" else char for char in line if unicodedata.category(char) not in _UNPRINTABLE)


def markdown(text: object) -> str:
    r"""Write a foreign name so that Markdown shows it as it is, also in a table cell.

    >>> print(markdown("a|b <i> [x](y)"))
    a\|b &lt;i&gt; \[x\](y)
    """
    escaped = re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", plain(text))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def redact(text: str, *, environ: Mapping[str, str] | None = None) -> str:
    """Mask what looks like a secret: user names in addresses, `...token=VALUE`, values of secret environment variables.

    >>> redact("train.py logger.api_key=abc url=https://me:pw@host/x", environ={})
    'train.py logger.api_key=*** url=https://***@host/x'
    """
    for name, value in (os.environ if environ is None else environ).items():
        if len(value) >= 8 and _SECRET_VARIABLE.search(name):
            text = text.replace(value, _MASK)
    text = _URL_USER.sub(f"{_MASK}@", text)
    return _SECRET_TEXT.sub(rf"\1{_MASK}", text)


def redact_words(words: Sequence[str]) -> list[str]:
    """Mask secrets in the words of a command line, also values that hold spaces.

    >>> redact_words(["train.py", "+hub.token=a b", "model.cls_token=true"])
    ['train.py', '+hub.token=***', 'model.cls_token=true']
    """
    matches = [(_SECRET_WORD.match(word), word) for word in words]
    return [match.group() + _MASK if match else redact(word) for match, word in matches]


def count(value: float | None) -> str:
    """Write a large count with three digits: `273 k`, `1.24 M`, `3.63 G`."""
    return _scaled(value, 1000, ("", "k", "M", "G", "T", "P"))


def size(value: float | None) -> str:
    """Write bytes in decimal units: `842 B`, `1.09 MB`."""
    return _scaled(value, 1000, ("B", "kB", "MB", "GB", "TB", "PB"))


def _scaled(value: float | None, base: int, units: tuple[str, ...]) -> str:
    if value is None:
        return DASH
    power = 0
    while abs(value) >= base and power < len(units) - 1:
        value /= base
        power += 1
    digits = f"{value:.0f}" if power == 0 else _three(value)
    return f"{digits} {units[power]}".rstrip()


def _three(value: float) -> str:
    """Write with three significant digits, no exponent between 0.001 and 100000."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -3 or magnitude > 5:
        return f"{value:.2e}"
    return f"{value:.{max(0, 2 - magnitude)}f}"


def number(value: float | None) -> str:
    """Write any number with three significant digits."""
    return DASH if value is None else _three(value)


def milliseconds(value: float | None) -> str:
    """Write a latency: `0.412 ms`."""
    return DASH if value is None else f"{_three(value)} ms"


def times(value: float | None) -> str:
    """Write a ratio as people say it: `17×`, `5.2×`, `0.93×`."""
    if value is None:
        return DASH
    return f"{value:,.0f}×" if value >= 10 else f"{value:.1f}×" if value >= 1.95 else f"{value:.2f}×"


_PARTS = ("acc", "accuracy", "top", "f1", "precision", "recall", "auroc", "auc", "map", "exact", "iou", "agreement")


def is_share(metric: str) -> bool:
    """Tell whether a metric is a share of 1 (accuracy, F1, AUROC ...): its differences read as percentage points."""
    name = metric.lower().rsplit("/", 1)[-1]
    if name.endswith(("accuracy", "f1score", "precision", "recall", "auroc")):
        return True
    return any(re.match(rf"{part}(?![a-z])", word) for part in _PARTS for word in re.split(r"[_\-.]", name))


def quality(value: float | None) -> str:
    """Write a quality value: three decimals below 10, three digits above."""
    if value is None:
        return DASH
    return f"{value:.3f}" if 0.001 <= abs(value) < 10 or value == 0 else _three(value)


def difference(value: float, metric: str) -> str:
    """Write the size of a difference between two quality values, in points for shares: `2.3 points`, `0.12`."""
    return f"{100 * abs(value):.1f} points" if is_share(metric) else quality(abs(value))


def duration(seconds: float | None) -> str:
    """Write a time span: `4.2 s`, `3 min 5 s`, `2 h 7 min`."""
    if seconds is None:
        return DASH
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def short_dtype(name: object) -> str:
    """Give `float32` and `torch.bfloat16` the short names `fp32` and `bf16`; other names stay."""
    word = str(name).removeprefix("torch.")
    return {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}.get(word, word)


def runtime_name(runtime: Any) -> str:
    """Name an engine and its threads from a record's `runtime`, which is a string or an object."""
    if runtime is None:
        return DASH
    if not isinstance(runtime, Mapping):
        return plain(runtime)
    threads = runtime.get("threads")
    parts = [plain(runtime.get("engine", "?")), plain(short_dtype(runtime.get("dtype") or ""))]
    parts.append(f"{threads} thread{'s' if threads != 1 else ''}" if threads else "")
    return ", ".join(part for part in parts if part)
