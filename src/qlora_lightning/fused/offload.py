"""Blocks' inputs in pinned host memory between forward and backward, copied beside the computation on a stream of their own.

A layer of 7B computes for milliseconds on a microbatch whose input crosses a PCIe 5 link in one: the copies cost no time, and what they
save is what grows with the number of layers.
"""

import torch
from torch import Tensor

IN_FLIGHT = 2
"""Inputs that may be on their way out at once; device memory for so many is held."""


class HostInputs:
    """The inputs of all blocks, one forward at a time.

    Args:
        layers: number of blocks.
        width: d.
        dtype: of the inputs.
        device: where they are computed.
    """

    def __init__(self, layers: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self._host = torch.empty(layers, 0, width, dtype=dtype)
        self._stream = torch.cuda.Stream(device)
        self._tokens = 0
        self._leaving: list[tuple[Tensor, torch.cuda.Event]] = []
        self._coming: dict[int, tuple[Tensor, torch.cuda.Event]] = {}

    def reserve(self, tokens: int) -> None:
        """Make room for a microbatch of N tokens."""
        layers, room, width = self._host.shape
        if tokens > room:
            dtype, self._host = self._host.dtype, torch.empty(0)  # what is pinned is given back before more is asked for
            self._host = torch.empty(layers, tokens, width, dtype=dtype, pin_memory=True)
        self._tokens = tokens

    def put(self, number: int, x: Tensor) -> None:
        """Start copying block ``number``'s input out; the caller forgets ``x``."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._host[number, : self._tokens].copy_(x, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        self._leaving.append((x, done))
        if len(self._leaving) > IN_FLIGHT:
            self._let_go()

    def finish(self) -> None:
        """Wait, on the device, until everything is out: the end of a forward."""
        while self._leaving:
            self._let_go()

    def _let_go(self) -> None:
        x, done = self._leaving.pop(0)
        torch.cuda.current_stream().wait_event(done)  # x's memory is given to others from here on
        del x

    def take(self, number: int) -> Tensor:
        """Block ``number``'s input, back on the device; that of the block before starts its way."""
        if number not in self._coming:
            self._fetch(number)
        x, done = self._coming.pop(number)
        if number > 0:
            self._fetch(number - 1)
        torch.cuda.current_stream().wait_event(done)
        return x

    def _fetch(self, number: int) -> None:
        # Allocated on the computing stream, whose earlier work may still use that memory: the copy waits for it.
        source = self._host[number, : self._tokens]
        x = torch.empty(source.shape, dtype=source.dtype, device=self._stream.device)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            x.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        self._coming[number] = (x, done)
