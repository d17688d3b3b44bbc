"""Messages between processes that are no collective calls, so that threads beside the training can exchange them.

They go through the store with which the processes found each other, over a connection of their own.
"""

import os
import secrets
from datetime import timedelta

import torch


class Channel:
    """Connections to the processes' common store, under a name that belongs to this run alone."""

    def __init__(self):
        """A collective call."""
        name = [secrets.token_hex(8)]
        torch.distributed.broadcast_object_list(name)
        self._name = name[0]
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def connect(self, timeout):
        """A store (set, get, multi_get; all of them wait `timeout` seconds at most) for one thread's own use.

        It raises torch.distributed.DistError once the first process, whose store it is, is gone or answers no more.
        """
        if self.ranks == 1:
            return torch.distributed.HashStore()
        store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False,
                                           timedelta(seconds=timeout))
        return torch.distributed.PrefixStore(self._name, store)
