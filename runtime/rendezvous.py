"""Let the processes connect again each time the launchers start them.

Launchers that meet over the network (`torchrun --rdzv_backend=c10d`, which `--standalone` uses, too) keep one store of
addresses as long as they live. After a restart (`--max-restarts`), a new process may read the address of a dead process
there and fail, because torch 2.13 (torch/distributed/rendezvous.py) treats the old store as new. So rank 0 opens its
own store, and writes only its port into the store of the launchers. The other processes try to connect to this port. An
old port does not answer: the launchers start new processes only after all old ones have ended.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

SECONDS = 300  # until all processes have started: they start together, but loading libraries may be slow
TRY_SECONDS = 3
KEY = "port of rank 0"


def new_rendezvous():
    """Let `init_process_group` use a new store for this start. Raises RuntimeError if rank 0 cannot be reached."""
    from torch.distributed import TCPStore

    address, rank = os.environ["MASTER_ADDR"], int(os.environ["RANK"])
    launchers = TCPStore(address, int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=SECONDS))
    if rank == 0:
        mine = TCPStore(address, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
        _open.append(mine)  # keeps it open; with `multi_tenant`, init_process_group finds it by its port
        port = mine.port
        launchers.set(KEY, str(port))
    else:
        port = _port_of_rank_0(address, launchers)
    os.environ |= {"MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def _port_of_rank_0(address, launchers):
    """Wait until a port in the launchers' store answers. Returns the port."""
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
