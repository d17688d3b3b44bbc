"""Several processes that evaluate together, as torchrun or DeepSpeed starts them; each takes its share."""

import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from torch import distributed

from sidfast.common.errors import UserError


@dataclass(frozen=True)
class Group:
    """This process among `processes`. All of its methods are collective calls."""

    rank: int = 0
    processes: int = 1

    def together(self, action, *, first_only=False):
        """The result of `action()`; a UserError of any process is raised by all. `first_only`: None on the others."""
        result, fault = None, None
        try:
            if self.rank == 0 or not first_only:
                result = action()
        except UserError as error:
            fault = str(error)
        faults = [fault]
        if self.processes > 1:
            faults = [None] * self.processes
            distributed.all_gather_object(faults, fault)
        for text in faults:
            if text is not None:
                raise UserError(text)
        return result


@contextmanager
def joined():
    """The Group that the launcher's environment describes; over gloo, for all that is exchanged is when and whether."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes == 1:
        yield Group()
        return
    distributed.init_process_group("gloo", timeout=timedelta(days=2))          # a share may take hours longer
    try:
        yield Group(distributed.get_rank(), processes)
    finally:
        distributed.destroy_process_group()
