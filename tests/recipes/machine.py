"""A machine: one table in one file; `plan --machine` takes it."""

from .recipe import Edit, Recipe

CHECK = """
import manyhands as mh
from typer.testing import CliRunner
from manyhands.cli.main import app
from manyhands.plan.machine import machine_named, machine_names

assert "example-npu" in machine_names() and machine_named("example-npux4").devices == 4
runner = CliRunner()
plan = runner.invoke(app, ["plan", "olmoe-1b-7b", "--machine", "example-npux4"])
assert plan.exit_code == 0 and "Example NPU 96 GB" in plan.output, plan
near = runner.invoke(app, ["plan", "olmoe-1b-7b", "--machine", "example-npy"])
assert isinstance(near.exception, mh.ConfigError) and "example-npu" in str(near.exception)
"""

RECIPE = Recipe(
    "Add a machine",
    (
        Edit(
            "manyhands/plan/machines.toml",
            """
[example-npu]
title = "Example NPU 96 GB"
kind = "gpu"
memory = 103_079_215_104  # 96 GiB
bandwidth = 2.4e12
rates = { bf16 = 400e12, int8 = 800e12 }
link = 200e9
network = 25e9
node = 8
source = "where each of these figures is published"
""",
        ),
    ),
    CHECK,
)
