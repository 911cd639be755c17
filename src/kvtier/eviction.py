"""EvictionPolicy: a policy of your own, in Python, for `kvtier replay --policy module:Class`.

It gets the calls of a native policy in the same order (csrc/index/include/kvtier/index/eviction.h), so that
what is found here can be written down there. Slow, and in simulations only: for research.

class Youngest(EvictionPolicy):            # most recently stored goes first
    def __init__(self, blocks):
        self.evictable = {}

    def insert(self, block, key, depth, parent):
        self.evictable[block] = True

    def hold(self, block):
        self.evictable[block] = False
    ...
"""

import importlib
import sys
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from kvtier.errors import ConfigError


class EvictionPolicy(ABC):
    """Decides which block goes when a slot is needed. It decides and never acts.

    Blocks are numbers that are used again after erase(). Each is *evictable* or *held* (pinned, or leaf first
    and a younger block hangs on it); holding and letting go is no use of it.

    Attributes:
        leaf_first: Whether a block is held while one that hangs on it is resident. Not in plain replays.
    """

    leaf_first: ClassVar[bool] = True

    def __init__(self, blocks: int) -> None:  # noqa: B027 - what a policy keeps is its own affair
        """Makes the policy of one empty tier.

        Args:
            blocks: Most that are resident at once.
        """

    @abstractmethod
    def insert(self, block: int, key: bytes, depth: int, parent: int | None) -> None:
        """A block became ready, just now; evictable.

        Args:
            block: Its number.
            key: The 32 bytes that name its content: the same when it comes back.
            depth: Blocks before it in its prompt.
            parent: The block that it hangs on, if this policy knows it: a drive's has its own blocks alone.
        """

    @abstractmethod
    def touch(self, block: int) -> None:
        """It was used."""

    @abstractmethod
    def hold(self, block: int) -> None:
        """It may not go for now."""

    @abstractmethod
    def let_go(self, block: int) -> None:
        """It may go again."""

    @abstractmethod
    def erase(self, block: int, evicted: bool) -> None:
        """It left: it was the victim, or something else ended it."""

    @abstractmethod
    def victim(self) -> int | None:
        """The block to evict next; asked again at once it is the same. None if every block is held."""

    def advance(self, now_us: int) -> None:  # noqa: B027 - most do not ask for the time
        """The trace's time of what follows; never goes back."""


def load_policy(name: str) -> type[EvictionPolicy]:
    """Finds "module:Class"; modules in the working directory too.

    Raises:
        ConfigError: There is no such module or class, or it is no EvictionPolicy.
    """
    module_name, _, class_name = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, ValueError, AttributeError) as error:
        raise ConfigError(f"policy {name!r} cannot be had: {error}") from error
    if not isinstance(found, type) or not issubclass(found, EvictionPolicy):
        allowed = "allowed: a subclass of kvtier.eviction.EvictionPolicy"
        raise ConfigError(f"policy {name!r} is {found!r}; {allowed}")
    return found
