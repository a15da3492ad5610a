"""One call of a module: its arguments and autocast settings, to be made again later."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prox24_lightning.calibration.calls.arguments import copied_arguments, form_of, is_plain, leaves_of, with_leaves
from prox24_lightning.calibration.calls.random_state import RandomState
from prox24_lightning.utils.tensors import to_device


@dataclass(frozen=True)
class ModuleCall:
    """The arguments of one call of a module.

    Attributes:
        args, kwargs: as they were passed, key-value caches left out.
        autocast: the autocast dtype the call ran under; None: no autocast.
        autocast_cache: whether autocast kept its casts: under another setting compiled code is compiled again.
        number: the place of the call in the order of all recorded calls.
        place: position or name of the hidden state, whose place holds None; None: the arguments are whole.
        random: the states of the random number generators when the call was made, from which it is made again;
            None: it draws no random numbers.
    """

    args: tuple
    kwargs: dict[str, Any]
    autocast: torch.dtype | None = None
    autocast_cache: bool = False
    number: int = 0
    place: int | str | None = None
    random: RandomState | None = None

    @classmethod
    def record(
        cls, module: nn.Module, args: tuple, kwargs: dict[str, Any], number: int = 0, *, random: bool = False
    ) -> ModuleCall:
        """Return the call that is being made now, with the very tensors it is made with.

        Args:
            random: with the states of the random number generators.
        """
        device = device_of(module)
        kind = device.type
        return cls(
            tuple(no_cache(value) for value in args),
            {key: no_cache(value) for key, value in kwargs.items()},
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            torch.is_autocast_cache_enabled(),
            number,
            random=RandomState.now(device) if random else None,
        )

    def __call__(self, module: nn.Module) -> Any:
        """Make the call, with copies of the arguments: the module may write into them."""
        device = device_of(module)
        kind = device.type
        enabled = self.autocast is not None
        args, kwargs = copied_arguments((self.args, self.kwargs), detach=False)
        if self.random is not None:
            self.random.restore(device)
        with torch.autocast(kind, dtype=self.autocast, enabled=enabled, cache_enabled=self.autocast_cache):
            return module(*args, **kwargs)

    def place_of(self, tensor: Tensor | None) -> int | str | None:
        """Return where ``tensor`` itself stands among the arguments: position or name; None if it does not."""
        if tensor is None:
            return None
        entries: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        return next((place for place, value in entries if value is tensor), None)

    def hidden_place(self, block: str) -> int | str:
        """Return where the hidden state of a block stands: ``hidden_states``, or the first floating tensor.

        Raises:
            ValueError: if no argument is a floating tensor.
        """
        entries: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        entries.sort(key=lambda entry: entry[0] != "hidden_states")
        for place, value in entries:
            if isinstance(value, Tensor) and value.is_floating_point():
                return place
        raise ValueError(
            f"block {block} is called without a floating tensor; name the right list of modules with blocks="
        )

    def argument(self, place: int | str) -> Any:
        """Return the argument at a position or of a name."""
        return self.args[place] if isinstance(place, int) else self.kwargs[place]

    def with_argument(self, place: int | str, value: Any) -> ModuleCall:
        """Return the same call with another argument at a position or of a name."""
        if isinstance(place, int):
            return replace(self, args=(*self.args[:place], value, *self.args[place + 1 :]))
        return replace(self, kwargs={**self.kwargs, place: value})

    def without_hidden(self, place: int | str) -> ModuleCall:
        """Return the call without its hidden state, which :meth:`with_hidden` puts in again."""
        return replace(self.with_argument(place, None), place=place)

    def with_hidden(self, hidden: Tensor) -> ModuleCall:
        """Return the whole call with ``hidden`` in the place that was left out."""
        return self if self.place is None else replace(self.with_argument(self.place, hidden), place=None)

    def to(self, device: torch.device | str) -> ModuleCall:
        """Return the call with every tensor on ``device``."""
        args, kwargs = to_device((self.args, self.kwargs), device)
        return replace(self, args=args, kwargs=kwargs)

    def copied(self) -> ModuleCall:
        """Return the call with copies of its arguments, which later changes in place do not reach.

        Raises:
            ValueError: for arguments that cannot be copied.
        """
        args, kwargs = copied_arguments((self.args, self.kwargs))
        return replace(self, args=args, kwargs=kwargs)

    @property
    def form(self) -> str:
        """How the arguments are built: :func:`~prox24_lightning.calibration.calls.arguments.form_of`."""
        return form_of((self.args, self.kwargs))

    def state_dict(self) -> dict[str, Any]:
        """Return plain types and tensors. Arguments of the user's classes are taken apart, and need a template."""
        state: dict[str, Any] = {
            "autocast": str(self.autocast).removeprefix("torch."),
            "autocast_cache": self.autocast_cache,
            "random": None if self.random is None else self.random.state_dict(),
        }
        arguments = to_device((self.args, self.kwargs), "cpu")
        if is_plain(arguments[0]) and is_plain(arguments[1]):
            return {**state, "args": list(arguments[0]), "kwargs": arguments[1]}
        return {**state, "form": self.form, "leaves": leaves_of(arguments)}

    @classmethod
    def from_state_dict(
        cls, state: dict[str, Any], device: torch.device, template: ModuleCall | None = None
    ) -> ModuleCall | None:
        """Undo :meth:`state_dict`, with the tensors on ``device``.

        Args:
            template: a call whose arguments have the same form, if the state holds them taken apart: classes come from
                the running program, never from a file.

        Returns:
            None if a template is needed, and is not given or has another form.
        """
        if "args" in state:
            args, kwargs = to_device((tuple(state["args"]), state["kwargs"]), device)
        elif template is not None and template.form == state["form"]:
            args, kwargs = with_leaves((template.args, template.kwargs), state["leaves"], device)
        else:
            return None
        random = None if state["random"] is None else RandomState.from_state_dict(state["random"])
        autocast = getattr(torch, state["autocast"], None)
        return cls(args, kwargs, autocast, state["autocast_cache"], random=random)


def no_cache(value: Any) -> Any:
    """Return ``value``, or None for a key-value cache, which a second call must not see."""
    # Known by what it does rather than by class, so that every release of transformers is covered.
    return None if hasattr(value, "get_seq_length") else value


def device_of(module: nn.Module) -> torch.device:
    """Return the device of the module's first parameter; the CPU if it has none."""
    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
