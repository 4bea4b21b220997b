"""A verb: `manyhands layers MODEL` lists which layers of a model are sparse."""

from .recipe import Edit, Recipe

CHECK = """
import json
import manyhands as mh
from typer.testing import CliRunner
from manyhands.cli.main import app

runner = CliRunner()
shown = runner.invoke(app, ["--help"])
assert shown.exit_code == 0 and "layers" in shown.output and "Which layers of a model are sparse." in shown.output
mh.save(mh.Decoder(mh.ModelConfig(vocab_size=40, hidden_size=64, num_hidden_layers=2, moe=mh.MoEConfig())), "model")
assert json.loads(runner.invoke(app, ["layers", "model", "--json"]).output) == {"sparse": [0, 1], "layers": 2}
wrong = runner.invoke(app, ["layers", "nowhere"])
assert isinstance(wrong.exception, mh.CheckpointError), wrong
"""

RECIPE = Recipe(
    "Add a verb",
    (
        Edit(
            "manyhands/cli/layers.py",
            '''"""`manyhands layers`: which layers are mixtures of experts."""

from pathlib import Path
from typing import Annotated

import typer


def layers(
    model: Annotated[Path, typer.Argument(help="A checkpoint, a run, or a name on the Hugging Face hub.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Which layers of a model are sparse."""
    from manyhands.checkpoint.find import open_checkpoint

    config = open_checkpoint(model).config
    if json_output:
        import json

        print(json.dumps({"sparse": config.sparse_layers, "layers": config.num_hidden_layers}))
        return
    print(f"{len(config.sparse_layers)} of {config.num_hidden_layers} layers: {config.sparse_layers}")
''',
        ),
        Edit("manyhands/cli/main.py", "    layers,\n", after="    inspect,\n"),
        Edit(
            "manyhands/cli/main.py",
            'app.command("layers", cls=Verb)(layers.layers)\n',
            after='app.command("models", cls=Verb)(models.models)\n',
        ),
    ),
    CHECK,
)
