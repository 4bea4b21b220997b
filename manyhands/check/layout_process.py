"""One process of a layout that `manyhands check --layout` holds against one process: started by `layout_jobs.py`.

    python -m manyhands.check.layout_process FOLDER RANK SIZE        the description on stdin, the rows on stdout

They meet through files in FOLDER and need no port.
"""

import json
import sys

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from manyhands import strict_json
from manyhands.check.layout_jobs import plain
from manyhands.check.layouts import layout_rows
from manyhands.config import RunConfig, parse
from manyhands.errors import ManyhandsError
from manyhands.parallel.group import Group


def main() -> int:
    """Exit code 0, or that of the error, which is one line on stderr."""
    folder, rank, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    told = strict_json.loads(sys.stdin.read())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=FileStore(f"{folder}/meet", size), rank=rank, world_size=size)
    try:
        group = dist.group.WORLD
        assert group is not None
        run = parse(RunConfig, {name: told[name] for name in ("model", "balance", "train")})
        ranks = Group(group, rank, size, torch.device("cpu"))
        rows = [
            plain(row)
            for row in layout_rows(run.model, run.balance, run.train.sequence_length, ranks, told["ep"], told["seed"])
        ]
        dist.barrier()  # one that has left already would take another, which is not done, with it
    except ManyhandsError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    finally:
        dist.destroy_process_group()
    if rank == 0:
        print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
