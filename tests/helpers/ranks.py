"""A function on several real processes with a gloo group between them, in a fraction of a second each time."""

import multiprocessing
import os
import traceback

import torch
import torch.distributed as dist

PREPARED = multiprocessing.get_context("forkserver")  # a plain fork would share a used autograd engine
PREPARED.set_forkserver_preload(["torch", "torchvision"])  # sends what it starts as spawn does, in a tenth of the time


def on_ranks(world, function, folder, *arguments, timeout=60):
    """``[function(rank, *arguments) for each rank]`` (picklable results), each in a process of its own.

    ``function`` stands at the top of a module. ``folder`` is empty and the caller's, where the processes meet.
    """
    meeting = str(folder / f"meeting{len(list(folder.iterdir()))}")
    ranks, answers = [], []
    for rank in range(world):
        answer, told = PREPARED.Pipe(duplex=False)
        ranks.append(PREPARED.Process(target=_one, args=(rank, world, meeting, told, function, arguments)))
        answers.append(answer)
        ranks[-1].start()
        told.close()  # so that a rank which dies without a word ends the waiting
    try:
        results = [answer.recv() if answer.poll(timeout) else ("no answer", None) for answer in answers]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    wrong = [text for text, _ in results if text]
    assert not wrong, wrong[0]
    return [result for _, result in results]


def _one(rank, world, meeting, told, function, arguments):
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
        answer = "", function(rank, *arguments)
        dist.barrier()
    except Exception:
        answer = traceback.format_exc(), None
    told.send(answer)
