"""Run a script's `main` as a command: an error becomes one message and an exit status."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from configs.config import UserError, load_config
from runtime.console import rank
from runtime.memory import keep_freed_memory
from runtime.plan import dry_run
from runtime.run_folder import check_system, on_refusal, undo_all
from runtime.spinning import watch_cores


def cli(main, Config, several=False):
    """Run `main(load_config(Config))` as a command: a UserError becomes one message and exit status 2.

    So does an error of the machine (no memory, no disk, a lost process): see runtime/failures.py. A run that ends in a
    UserError or by Ctrl-C before its first log line leaves its folder as it was: see runtime/run_folder.py.
    """
    config = None
    on_refusal.clear()
    keep_freed_memory()
    watch_cores()
    try:
        check_system()
        config = load_config(Config)
        if not several:
            refuse_several()
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # launchers that may start all processes again
            from runtime.rendezvous import new_rendezvous

            new_rendezvous()
        if not dry_run(config):
            main(config)
    except UserError as error:
        undo_all()
        if os.environ.get("RANK", "0") != "0":  # rank 0 mostly prints the same; then the launcher ends this process
            time.sleep(3)
        print(f"error: {error}", file=sys.stderr)
        leave_processes()
        sys.exit(2)
    except KeyboardInterrupt:
        undo_all()
        if rank() == 0:
            print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except SystemExit as end:
        if end.code:  # a signal before the first log line, or a UserError in another process
            undo_all()
        leave_processes()
        raise
    except Exception as error:
        from runtime.failures import explain

        message = config and explain(error, config)
        if not message:
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            os._exit(2)  # at once: the others may have ended, and the launcher waits to start all again
        sys.exit(2)
    leave_processes()


def refuse_several():
    """Raise UserError if a launcher started this script in several processes: each would do the whole work."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            f"{Path(sys.argv[0]).name} runs in one process, and {os.environ['WORLD_SIZE']} were started. Start it with "
            "python; train/train_lm_ddp.py, train_lm_fsdp.py, train_lm_tp.py and the training scripts of rlhf/ take "
            "torchrun"
        )


def leave_processes():
    """Close the connections to the other processes. Otherwise gloo's threads abort the interpreter at its end."""
    if "torch.distributed" in sys.modules:
        dist = sys.modules["torch.distributed"]
        if dist.is_available() and dist.is_initialized():
            # gloo's threads need the interpreter to free their last tensors, but destroy_process_group holds it and
            # waits for them. Without this pause, and while a DDP wrapper exists, it can wait for ever.
            time.sleep(0.2)
            dist.destroy_process_group()
