"""Without a GPU the Triton kernels run in Triton's interpreter, which must be asked for before triton is imported."""

import os
from typing import Any

import numpy as np
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    import triton.language as tl
    from triton.runtime import interpreter

    _converted = interpreter._convert_float

    def _rounded(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        """To bf16 as a GPU rounds, to nearest: the interpreter cuts off."""
        if (source, target) != (tl.float32, tl.bfloat16):
            return _converted(data, source, target, rounding)
        return torch.from_numpy(np.array(data, np.float32)).bfloat16().view(torch.uint16).numpy()

    interpreter._convert_float = _rounded

    _patched = interpreter._patch_lang_tensor

    def _indexable(tensor: Any, scope: Any) -> None:
        """A loop's bounds may be computed: NumPy no longer takes an array of one entry for a number."""
        _patched(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _indexable

    _dot = interpreter.InterpreterBuilder.create_dot

    def _wide_dot(self: Any, left: Any, right: Any, total: Any, *options: Any) -> Any:
        """Of bf16 tensors: the interpreter would multiply their bits."""
        if left.dtype.scalar == tl.bfloat16:
            left, right = (
                interpreter.TensorHandle((factor.data.astype(np.uint32) << 16).view(np.float32), tl.float32) for factor in (left, right)
            )
        return _dot(self, left, right, total, *options)

    interpreter.InterpreterBuilder.create_dot = _wide_dot
