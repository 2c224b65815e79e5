"""Every way to have a teacher and every family of losses, as whole runs: alone, by two ranks, killed, gone on with."""

import csv
import json
import signal
from dataclasses import dataclass

import pytest
import torch
from warm import Ranks, Started, wait_for, warm

from lightning_opt.checkpointing import load_primitives
from lightning_opt.testing import compare_checkpoints

TASK = "train/loss_task"
COMMON = ["trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "callbacks.checkpoints.every_n_steps=2"]
COMMON += ["baseline=false", "benchmark=false", "export=false"]
IMAGES = ["data=synthetic_images", "data.num_train=128", "data.num_eval=33", "data.size=8"]
MLP = ["model=mlp", "model.input_shape=[3,8,8]", "model.hidden=[16]"]
TEACHER_MLP = ["teacher.model._target_=lightning_opt.models.MLP", "teacher.model.input_shape=[3,8,8]"]
TEACHER_MLP += ["teacher.model.hidden=[32]", "teacher.train.max_epochs=1", "teacher.train.data=null"]
DISTILL = ["+experiment=distill", *IMAGES, *MLP, "trainer.max_epochs=3"]
TEXT = ["data=text_files", "data.train=[../letters.txt]", "data.val=[../letters.txt]", "data.context_length=16"]
GPT = ["model=gpt", "model.dim=8", "model.depth=1", "model.heads=2", "task.num_outputs=5"]
LANGUAGE = ["trainer.max_epochs=null", "trainer.max_steps=24", "trainer.val_check_interval=8"]


def between(student, teacher, *terms):
    """Point the layers of losses that compare features at a module of each network."""
    return [
        word
        for term in terms
        for word in (f"~loss.terms.{term}.loss.layers", f"+loss.terms.{term}.loss.layers={{{student}: {teacher}}}")
    ]


@dataclass(frozen=True)
class Job:
    """One command, and whether a rank's share of a batch gives its share of the loss, so that two ranks equal one."""

    words: list[str]
    batch_size: int
    adds_up: bool = True


JOBS = {
    # Stored answers of two teachers on augmented samples, which epoch e reads in version e % 2.
    "stored answers": Job(
        words=[
            *DISTILL,
            *TEACHER_MLP,
            "data.variants=2",
            "data.augment={_target_: lightning_opt.data.RandomShift, pixels: 1}",
            "teacher.members=2",
            "teacher.cache.outputs=top_k",
            "teacher.cache.k=4",
        ],
        batch_size=16,
    ),
    "several teachers": Job(
        words=[
            *DISTILL,
            *TEACHER_MLP,
            "teacher.members=2",
            "teacher.cache=null",
            "+teacher.weighting={_target_: lightning_opt.losses.ConfidenceWeights}",
            "loss=[kd,dist]",
            "loss.terms.dist.loss.intra=0.0",
        ],
        batch_size=16,
    ),
    # The memory banks of CRD, the pairs of RKD and a projector, several at once, from a finished run's folder.
    "a run folder, relations and contrast": Job(
        words=[
            *DISTILL,
            "teacher=run",
            "teacher.run_dir=../mlp",
            "teacher.cache=null",
            "loss=[kd,fitnets,rkd,crd]",
            *between("layers.0", "layers.0", "fitnets", "rkd_distance", "rkd_angle", "crd"),
            "loss.terms.crd.loss.n_data=128",
            "loss.terms.crd.loss.n_negatives=32",
            "loss.terms.crd.loss.feature_dim=8",
        ],
        batch_size=16,
        adds_up=False,  # pairs are formed among the samples of one rank
    ),
    "a file, sequences": Job(
        words=[
            "+experiment=distill_lm",
            *TEXT,
            *GPT,
            *LANGUAGE,
            "teacher.model.dim=16",
            "teacher.model.depth=1",
            "teacher.model.heads=2",
            "teacher.weights=../gpt/artifact/model.safetensors",
            "loss=[forward_kl,generalized_jsd]",
        ],
        batch_size=16,
    ),
    "samples of the student": Job(
        words=[
            "+experiment=distill_lm",
            *TEXT,
            *GPT,
            *LANGUAGE,
            "model.dropout=0.1",
            "teacher.model.dim=16",
            "teacher.model.depth=1",
            "teacher.model.heads=2",
            "teacher.train.max_steps=4",
            "loss=[skew_reverse_kl,on_policy]",
            "loss.sampling.prompt_length=4",
            "loss.sampling.max_new_tokens=4",
        ],
        batch_size=16,
        adds_up=False,  # each rank writes its own samples
    ),
}


class Place:
    """Where the runs of this file are made, each job's in a folder of its own and each only once."""

    def __init__(self, folder):
        self.folder, self.cache = folder, folder / "cache"
        (folder / "letters.txt").write_text("abcd" * 1600)
        (folder / "start").mkdir()
        self._made = {}

    def teacher(self, name):
        """Train what is read from a folder or a file."""
        words = {
            "mlp": [*IMAGES, "model=mlp", "model.input_shape=[3,8,8]", "model.hidden=[32]", "trainer.max_epochs=1"],
            "gpt": ["task=language_modeling", *TEXT, *GPT, *LANGUAGE, "model.dim=16", "trainer.max_steps=4"],
        }[name]
        out = warm(*words, *COMMON, f"run_dir=../{name}", cwd=self.folder / "start", cache=self.cache)
        assert out.returncode == 0, out.stderr

    def words(self, job, run, ranks):
        share = ["trainer.devices=2", "strategy=ddp"] if ranks == 2 else []
        return [*JOBS[job].words, *COMMON, *share, f"data.batch_size={JOBS[job].batch_size // ranks}", f"run_dir={run}"]

    def prepare(self, job):
        for name in ("mlp", "gpt"):
            if any(f"../{name}" in word for word in JOBS[job].words) and not (self.folder / name).exists():
                self.teacher(name)
        place = self.folder / job.replace(" ", "_").replace(",", "")
        place.mkdir(exist_ok=True)
        return place

    def whole(self, job, ranks):
        """Return the folder of the uninterrupted run."""
        place, name = self.prepare(job), f"whole-{ranks}"
        if (job, ranks) not in self._made:
            self._made[job, ranks] = finish(self.start(job, place, name, ranks))
        return place / name

    def start(self, job, place, name, ranks):
        words = self.words(job, name, ranks)
        return (Ranks if ranks == 2 else Started)(words, cwd=place, cache=self.cache)


def finish(process):
    ended = process.end()
    ended = ended if isinstance(ended, list) else [ended]
    assert [one.returncode for one in ended] == [0] * len(ended), "".join(one.stderr for one in ended)
    return ended[0]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("whole_runs"))


def curve(folder, name):
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def student_of(folder):
    state = load_primitives(folder / "checkpoints" / "last.ckpt")["state_dict"]
    return {name: value for name, value in state.items() if name.startswith("model.")}


def kill_and_go_on(place, job, ranks):
    """Kill the job when its first checkpoint is there, run the command again, and return folder and last words."""
    where = place.prepare(job)
    folder = where / f"killed-{ranks}"
    process = place.start(job, where, folder.name, ranks)
    wait_for((folder / "checkpoints" / "last.ckpt").exists, process=process)
    process.kill() if ranks == 2 else process.signal(signal.SIGKILL)
    process.end()
    assert not (folder / "fit.json").exists(), "it was over before it was killed: the test tests nothing"
    return folder, finish(place.start(job, where, folder.name, ranks))


def differences(one, other):
    found = []
    for name in ("last.ckpt", "best.ckpt"):
        found += compare_checkpoints(one / "checkpoints" / name, other / "checkpoints" / name)
    ends = [json.loads((folder / "fit.json").read_text()) for folder in (one, other)]
    found += [name for name in ends[0] if name != "wall_seconds" and ends[0][name] != ends[1][name]]
    return found + ["metrics.csv"] * ((one / "metrics.csv").read_text() != (other / "metrics.csv").read_text())


each_job = pytest.mark.parametrize("job", JOBS)
QUICK = {"stored answers", "a run folder, relations and contrast"}
# Two ranks take turns on few cores: the default suite runs the jobs with the most state.
each_job_of_two = pytest.mark.parametrize(
    "job", [job if job in QUICK else pytest.param(job, marks=pytest.mark.slow) for job in JOBS]
)


@pytest.mark.support(method=["distil_relation", "distil_sequence"], strategy="one", feature="resume")
@each_job
def test_killed_run_ends_bit_equal(job, place):
    whole = place.whole(job, 1)
    folder, out = kill_and_go_on(place, job, 1)
    assert "going on from" in out.stderr
    assert differences(whole, folder) == []


@pytest.mark.support(method=["distil_relation", "distil_sequence"], strategy="ddp", feature="trains")
@each_job_of_two
def test_two_ranks_learn_the_same_and_what_one_learns_where_the_loss_adds_up(job, place):
    whole = place.whole(job, 2)
    terms = [name for name in next(csv.reader((whole / "metrics.csv").open())) if name.startswith("train/loss")]
    assert any(name.startswith("train/loss_") and name != TASK for name in terms), "no teacher was asked"
    # What a student wrote itself has no loss on labels.
    assert all(len(curve(whole, name)) == 24 for name in terms if (job, name) != ("samples of the student", TASK))
    if not JOBS[job].adds_up:
        return
    one = place.whole(job, 1)
    for name in terms:
        assert curve(whole, name) == pytest.approx(curve(one, name), rel=1e-4, abs=1e-5), name
    for name, value in student_of(one).items():
        torch.testing.assert_close(student_of(whole)[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.support(method=["distil_relation", "distil_sequence"], strategy="ddp", feature="resume")
@each_job_of_two
def test_two_killed_ranks_end_bit_equal(job, place):
    whole = place.whole(job, 2)
    folder, out = kill_and_go_on(place, job, 2)
    assert "going on from" in out.stderr
    assert differences(whole, folder) == []


def test_stored_answers_are_made_once_for_all(place):
    for ranks in (1, 2):
        place.whole("stored answers", ranks)
    assert len(list((place.cache / "teacher_outputs").glob("[!.]*"))) == 1
