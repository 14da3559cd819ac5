"""Several processes find each other anew each time the launchers start them.

Launchers that meet over the network (`torchrun --rdzv_backend=c10d`, also what `--standalone` is) keep one store of
addresses for as long as they live. After `--max-restarts` came into play, a new process may read there where one that
died was listening, and give up: torch 2.13, torch/distributed/rendezvous.py, takes the store for a new one. So rank 0
opens a store of its own and leaves only its port in that of the launchers. A port of before is told from the new one by
trying: the launchers start processes when all those of before have ended, so nobody listens there any more.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

SECONDS = 300  # for all to come: they start together, but a machine may be slow to load libraries
TRY_SECONDS = 3
KEY = "port of rank 0"


def new_rendezvous():
    """Have `init_process_group` use a store of this start alone. Raises RuntimeError when rank 0 does not come."""
    from torch.distributed import TCPStore

    address, rank = os.environ["MASTER_ADDR"], int(os.environ["RANK"])
    launchers = TCPStore(address, int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=SECONDS))
    if rank == 0:
        mine = TCPStore(address, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        _open.append(mine)  # or it would close; with `multi_tenant`, init_process_group finds it by its port
        port = mine.port
        launchers.set(KEY, str(port))
    else:
        port = _port_of_rank_0(address, launchers)
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _port_of_rank_0(address, launchers):
    """The port in the launchers' store once somebody listens there."""
    end = time.time() + SECONDS
    while True:
        port = int(launchers.get(KEY))  # waits until there is one
        try:
            socket.create_connection((address, port), timeout=TRY_SECONDS).close()
            return port
        except OSError as error:
            if time.time() > end:
                raise RuntimeError(f"rank 0 cannot be reached at {address}: connection refused") from error
            time.sleep(0.1)


_open = []  # the store of rank 0, until the process ends
