"""kvtier as a side: the whole engine, from pages to the host tier, or to disk and durable."""

import os
import time

import numpy as np
from harness import Store, batches, keys_of, serve

import kvtier
from kvtier.engine import finish_part, grant_store  # what kvtier.ranks, and so the vLLM adapter, stores with

# The batch of 16 is what a scheduler hands over in a step.
STEP_BATCH = 16
BATCH_BYTES = 32 << 20  # handed over at once, as with the others: copies and writes overlap
GOOD = ("ok", 0, "")
STEP_SLOT_BYTES = 8192  # of 32 bytes: a header of 4096, and as much for the payload
STEP_FILL = 2048  # stored at once on the way to the drive
STEP_DISK_BYTES = 12288  # the same, and its part of the catalog


def _matrix(keys):
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)


class Kvtier(Store):
    packages = ("kvtier", "numpy")

    def open(self, home, size, blocks, capacity, options):
        tokens = size // (32 * 2 * 8 * 128 * 2)  # the shape of an 8B model: 128 KiB a token
        layout = kvtier.KVLayout(32, 8, 128, "bfloat16", tokens)
        host = (blocks + 8) * (size + 8192) + (64 << 20)
        disk = {}
        if options["tier"] == "disk":
            disk = {
                "disk": kvtier.Disk(str(home / "disk"), capacity),
                "disk_admission": "all",
                "disk_write_budget": "unlimited",
                "disk_queue_depth": 32,
            }
        self.config = kvtier.Config(
            groups=[layout], model="kvtier-bench@1", block_tokens=tokens, host=host, **disk
        )
        self.tokens, self.blocks, self.on_disk = tokens, blocks, bool(disk)
        self.ids, self.each = np.arange(blocks), max(1, BATCH_BYTES // size)
        self.filling = []
        self.shape = (2 * blocks, 32, 2, tokens, 8, 128)
        self._open()
        if self.on_disk and self.engine.stats().disks[0].opened_from == "fresh":
            self._grow()
        return {
            "config": f"tier {options['tier']}, default copy threads, stores of 32 MiB; disk: admission all, "
            "no write budget, queue depth 32"
        }

    def _open(self):
        self.engine = kvtier.open(self.config)
        memory = self.pages.both.view(np.uint16).reshape(self.shape)
        self.attached = self.engine.attach(memory, axes="PLKTHD")

    def _grow(self):
        """A new store's files grow ahead of need: they are filled once, and not beside what is timed."""
        until = time.monotonic() + 60
        while any(c.usable < c.capacity for c in self.engine.stats().disks[0].classes):
            if time.monotonic() > until:
                raise TimeoutError("the disk tier's files did not grow in 60 s")
            keys = np.frombuffer(os.urandom(32 * self.blocks), np.uint8).reshape(-1, 32)
            self.engine.store(keys, self.attached, self.ids).wait()
            self.engine.flush()
            self.filling.append(keys)
        for keys in self.filling:
            self.engine.drop(keys)

    def put(self, keys):
        keys = _matrix(keys)
        if self.on_disk:
            self._until_durable(lambda: self._store_in_batches(keys), len(keys))
            return
        tickets = self._store_in_batches(keys)
        if (stored := sum(ticket.result().stored for ticket in tickets)) != len(keys):
            raise RuntimeError(f"stored {stored} of {len(keys)}")

    def _until_durable(self, store, count):
        """Stores, again where the files of a new store are still growing."""
        until = time.monotonic() + 60
        while True:
            tickets = store()
            self.engine.flush()
            durable = sum(ticket.durable_blocks for ticket in tickets)
            if durable == count:
                return
            if time.monotonic() > until:
                raise RuntimeError(f"durable {durable} of {count} after 60 s")
            time.sleep(0.02)

    def _store_in_batches(self, keys):
        tickets = []
        for i in range(0, len(keys), self.each):
            some = slice(i, i + self.each)
            parent = keys[i - 1].tobytes() if i else None
            tickets.append(
                self.engine.store(keys[some], self.attached, self.ids[some], first_block=i, parent=parent)
            )
        for ticket in tickets:
            ticket.wait()
        return tickets

    def get(self, keys):
        self.engine.wait_until_whole()  # right behind an opening not every block finds a slot to be read into
        ticket = self.engine.load(_matrix(keys), self.attached, self.ids + self.blocks).wait()
        return [int(o) == kvtier.BlockOutcome.LOADED for o in ticket.result().outcomes]

    def found(self, keys):
        return int((self.engine.lookup(_matrix(keys)).states() == kvtier.BlockState.READY).sum())

    def forget(self, keys):
        self.engine.drop(_matrix(keys))

    def cold(self):
        if self.on_disk:  # a new engine has nothing in its host tier
            self.engine.close()
            self._open()
            self.engine.wait_until_whole()

    def close(self):
        self.engine.close()

    def steps_open(self, count, options):
        self.count, self.wanted = count, options["steps"]
        on_disk, slots = options["tier"] == "disk", options["slots"]
        disk = kvtier.Disk(str(self.home / "disk"), count * STEP_DISK_BYTES + (64 << 20))
        extra = {"disk": disk, "disk_admission": "all", "disk_write_budget": "unlimited"} if on_disk else {}
        self.config = kvtier.Config(
            groups=[kvtier.KVLayout(1, 1, 16, "uint8", 1)],
            block_tokens=1,
            model="kvtier-bench@1",
            host=(2 * STEP_FILL if on_disk else slots + 1) * STEP_SLOT_BYTES,
            eviction="lru",  # what is stored last is there: so that it can be looked up, all of it
            **extra,
        )
        self._steps_start()
        if on_disk:
            self._fill_disk()
        else:
            self._fill_host()

    def _steps_start(self):
        self.engine = kvtier.open(self.config)
        self.engine.wait_until_whole()
        self.attached = self.engine.attach([np.zeros((self.count, 2, 1, 1, 16), np.uint8)])

    def _fill_host(self):
        slots, filled = self.engine.stats().host[0].capacity, 0
        while self.engine.stats().host[0].ready < slots:
            filled += 1
            self._store_all(self._keys(-filled))
        self.present = self._keys(-filled)

    def _fill_disk(self):
        """All keys on the drive, and none in the host tier."""
        self.present = self._keys(-1)
        for some in batches(self.present, STEP_FILL):
            self._until_durable(lambda keys=some: [self._store_all(keys)], len(some))
        self.engine.close()
        self._steps_start()
        there = int((self.engine.lookup(self.present).tiers() == kvtier.Tier.DISK).sum())
        if there != self.count:
            raise RuntimeError(f"{there} of {self.count} blocks are on the drive")

    def _keys(self, number):
        return _matrix(keys_of(number, self.count))

    def _store_all(self, keys):
        return self.engine.store(keys, self.attached, np.arange(len(keys))).wait()

    def steps(self, number):
        took = {}
        begin = time.perf_counter()
        match = self.engine.lookup(self.present)
        took["lookup"] = time.perf_counter() - begin
        if match.ready_blocks != self.count:
            raise RuntimeError(f"lookup found {match.ready_blocks} of {self.count}")
        if "prepare_load" in self.wanted:
            begin = time.perf_counter()
            lease = match.pin(ttl=60)
            took["prepare_load"] = time.perf_counter() - begin
            if lease.num_blocks != self.count:
                raise RuntimeError(f"pinned {lease.num_blocks} of {self.count}")
            lease.release()
        if "store_evicting_at_once" in self.wanted:
            kinds = [
                (f"{name}{suffix}", store, batch)
                for suffix, store in (("", self._granted), ("_copied", self._copied))
                for name, batch in (("store_evicting_16", STEP_BATCH), ("store_evicting_at_once", self.count))
            ]
            for i, (name, store, batch) in enumerate(kinds):
                self._evicting(took, name, store, batch, self._keys(len(kinds) * number + i))
        return took

    def _granted(self, keys, batch):
        """Reserves slots, evicts, commits, as if ranks had copied: no byte of a block moves."""
        native = self.engine._native
        for i in range(0, self.count, batch):
            grant, *_ = grant_store(native, 0, 1, keys[i : i + batch], 0, None, "", None, None)
            finish_part(native, grant, GOOD, True)

    def _copied(self, keys, batch):
        """The same with 32 bytes copied for each block, by the copy threads."""
        ids = np.arange(batch)
        tickets = [
            self.engine.store(keys[i : i + batch], self.attached, ids) for i in range(0, self.count, batch)
        ]
        for ticket in tickets:
            ticket.wait()

    def _evicting(self, took, name, store, batch, keys):
        before = self.engine.stats().evictions
        begin = time.perf_counter()
        store(keys, batch)
        took[name] = time.perf_counter() - begin
        evicted = self.engine.stats().evictions - before
        if evicted != self.count or self.engine.lookup(keys).ready_blocks != self.count:
            raise RuntimeError(f"evicted {evicted} of {self.count}")
        self.present = keys


if __name__ == "__main__":
    serve(Kvtier)
