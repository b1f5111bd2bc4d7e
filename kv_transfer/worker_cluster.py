"""What a worker is put together with of this package: `isthmus.worker.app.Cluster`, filled."""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from isthmus.config import WorkerConfig
from isthmus.ids import Ids
from isthmus.kv.layout import KvLayout
from isthmus.process.worker_context import WorkerContext
from isthmus.types import Place
from isthmus.v1 import admin_pb2
from kv_transfer.ownership.membership_task import Membership
from kv_transfer.ownership.store import OpenStore, OwnershipStore, connected
from kv_transfer.pool_memory import PoolMemory, RowMemory
from kv_transfer.selftest import round_trip


class JoiningWorker(Protocol):
    """What is registered of a worker; `isthmus.worker.app.Member` is one. That room reaches torch, this one may not."""

    @property
    def layout(self) -> KvLayout: ...

    @property
    def published(self) -> Callable[[], tuple[int, list[bytes]]]: ...

    @property
    def status(self) -> Callable[[], admin_pb2.GetStatusResponse]: ...

    @property
    def on_store_lost(self) -> Callable[[], None]: ...


@dataclass(frozen=True, slots=True)
class WorkerCluster:
    """One worker's: its settings, and how its store is opened."""

    config: WorkerConfig
    context: WorkerContext
    open_store: OpenStore
    ids: Ids

    def connected(self) -> AbstractAsyncContextManager[OwnershipStore]:
        return connected(self.open_store, self.config, self.context.clock)

    def host_memory(self, layout: KvLayout, rows: Mapping[Place, memoryview]) -> RowMemory:
        return PoolMemory(layout, rows)

    def self_test(self, layout: KvLayout) -> None:
        round_trip(layout, self.context.clock, self.ids)

    def joined(self, store: OwnershipStore, member: JoiningWorker) -> AbstractAsyncContextManager[None]:
        membership = Membership(
            self.config, self.context, member.status, self.open_store, os.getpid(), on_store_lost=member.on_store_lost
        )
        return membership.join(store, member.layout, member.published)
