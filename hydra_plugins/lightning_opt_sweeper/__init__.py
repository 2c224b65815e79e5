"""Hydra's hooks into a sweep of lightning_opt: who chooses the points, and who runs them on this machine.

Hydra runs plugins of the namespace `hydra_plugins` only, and loads all that lies in it in every Hydra program of the
environment: so nothing is imported here until a sweep of ours runs.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class LightningOptSweeper(Sweeper):
    """Let the sweep that lightning_opt has opened choose the points; Hydra's launcher runs them."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Make the launcher."""
        from hydra.core.plugins import Plugins

        self.config, self.hydra_context = config, hydra_context
        self.launcher: Launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Run the sweep; its words are known already, so there are none here."""
        from lightning_opt.config.sweeps_current import run

        run(self._launch)

    def _launch(self, words: Sequence[Sequence[str]], first: int) -> list[BaseException | None]:
        """Run jobs from their words and return what stopped each."""
        returned = self.launcher.launch(words, initial_job_idx=first)
        return [result._return_value if result.status == JobStatus.FAILED else None for result in returned]


class LightningOptLauncher(Launcher):
    """Run each job as a process of its own, several at once."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take nothing: the jobs compose their own config."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs and return when all have ended."""
        from lightning_opt.config.sweeps_current import run_processes

        return [_returned(error) for error in run_processes(job_overrides)]


def _returned(error: BaseException | None) -> JobReturn:
    result = JobReturn()
    result.status = JobStatus.COMPLETED if error is None else JobStatus.FAILED
    result.return_value = error
    return result


for _group, _class in (("hydra/sweeper", LightningOptSweeper), ("hydra/launcher", LightningOptLauncher)):
    _node = {"_target_": f"{__name__}.{_class.__name__}"}
    ConfigStore.instance().store(group=_group, name="lightning_opt", node=_node, provider="lightning_opt")
