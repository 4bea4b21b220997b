"""A run that tunes: `train`, with what `RunConfig.tune` asks for."""

from pathlib import Path

from manyhands.config import RunConfig
from manyhands.config.load import load_run
from manyhands.config.tune import EsftTuning
from manyhands.files import RUN
from manyhands.parallel.group import joined
from manyhands.parallel.ranks import Ranks, first
from manyhands.train.finish import Summary
from manyhands.train.loop import train
from manyhands.tune.expert_cfg import EXPERT_CFG, write_expert_cfg


def tune(path: Path, run: RunConfig, *, quiet: bool = False, ranks: Ranks | None = None) -> Summary:
    """Start or continue the tuning in directory `path`. Arguments and errors are those of `train`.

    Beside a finished run of `esft` lies `expert_cfg.json`, which says what DeepSeek's says.
    """
    if ranks is None:
        with joined(run.train.device) as found:
            return tune(path, run, quiet=quiet, ranks=found)
    summary = train(path, run, quiet=quiet, ranks=ranks)
    how = load_run(path / RUN).tune
    if isinstance(how, EsftTuning):
        first(ranks, lambda: write_expert_cfg(path / EXPERT_CFG, how))
    return summary
