"""Matrix products by cuBLASLt, with the fastest of those of its algorithms that give the same bits.

torch takes the first algorithm that cuBLASLt proposes for a shape; others are up to 15% faster. Which
one is fastest is measured, and may come out otherwise tomorrow: so only algorithms are compared that
do not split the sum, and whose results on real activations equal those of the first one bit for bit.
The choice then changes the time, never a vector.

Enumerators are those of cublasLt.h (CUDA 12 and 13).
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any, NamedTuple

import torch
from torch import Tensor

log = logging.getLogger(__name__)

WORKSPACE_BYTES = 64 * 2**20
MOST_ALGORITHMS = 8
ROUNDS, REPEATS = 3, 4  # of timing: interleaved, for under a power cap the first looks fastest

DATA_TYPES = {
    torch.float32: 0,  # CUDA_R_32F
    torch.float16: 2,  # CUDA_R_16F
    torch.bfloat16: 14,  # CUDA_R_16BF
    torch.float8_e4m3fn: 28,  # CUDA_R_8F_E4M3
}
COMPUTE_32F = 68
TRANSPOSE_A, EPILOGUE, BIAS_POINTER, BIAS_DATA_TYPE = 3, 7, 8, 26  # of a matmul descriptor
A_SCALE_POINTER, D_SCALE_POINTER, FAST_ACCUMULATION = 17, 20, 25
EPILOGUE_DEFAULT, EPILOGUE_BIAS, EPILOGUE_GELU_BIAS = 1, 4, 36
MAX_WORKSPACE, REDUCTION_SCHEMES = 1, 3  # of a preference


class CublasLtError(RuntimeError):
    """cuBLASLt is not there, or refused a call."""


class _Proposal(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


class CublasLt:
    """The library, its handle and its workspace on one device.

    Raises:
        CublasLtError: there is no such library in this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type != "cuda" or not torch.version.cuda:
            raise CublasLtError(f"{device} is no CUDA device")
        try:  # torch has loaded it, for its own products
            self._library = ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")
        except OSError as error:
            raise CublasLtError(str(error)) from error
        self.handle = ctypes.c_void_p()
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        with torch.cuda.device(device):
            self.call("Create", ctypes.byref(self.handle))

    def call(self, name: str, *arguments: Any) -> None:
        try:
            status = getattr(self._library, f"cublasLt{name}")(*arguments)
        except AttributeError as error:
            raise CublasLtError(str(error)) from error
        if status:
            raise CublasLtError(f"cublasLt{name}: status {status}")

    def product(
        self,
        weight: Tensor,
        bias: Tensor | None,
        gelu: bool,
        kind: Kind,
        scales: Scales | None = None,
    ) -> Product:
        return Product(self, weight, bias, gelu, kind, scales)


class Kind:
    """Products of one shape and epilogue, which share an algorithm: the same one of every layer."""

    def __init__(self) -> None:
        self.algorithm: Any = None


class Scales(NamedTuple):
    """Of a product of float8: device scalars in float32.

    Attributes:
        product: by which a weight^T is multiplied before the bias is added.
        out: by which a result in float8 is multiplied; None for one of another type.
    """

    product: Tensor
    out: Tensor | None


class Product:
    """out = gelu?(a weight^T + bias), or out += a weight^T where there is no bias.

    Args:
        weight: (N, K) float16, bfloat16 or, with scales, float8_e4m3fn, contiguous.
        bias: (N,) float16 or bfloat16, or None.
        gelu: by its tanh approximation, which is what cuBLASLt's epilogue computes.
        kind: whose algorithm is used, or chosen by the first call.
    """

    def __init__(
        self,
        library: CublasLt,
        weight: Tensor,
        bias: Tensor | None,
        gelu: bool,
        kind: Kind,
        scales: Scales | None = None,
    ) -> None:
        self.library = library
        self.weight, self.bias, self.kind, self.scales = weight, bias, kind, scales
        self.beta = ctypes.c_float(bias is None)
        self.descriptor = ctypes.c_void_p()
        library.call("MatmulDescCreate", ctypes.byref(self.descriptor), COMPUTE_32F, 0)
        # It thinks in columns: out^T = weight a^T, where `weight` as it lies is a transpose.
        self._describe(TRANSPOSE_A, ctypes.c_int32(1))
        epilogue = EPILOGUE_DEFAULT
        if bias is not None:
            epilogue = EPILOGUE_GELU_BIAS if gelu else EPILOGUE_BIAS
            self._describe(BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
            self._describe(BIAS_DATA_TYPE, ctypes.c_int32(DATA_TYPES[bias.dtype]))
        self._describe(EPILOGUE, ctypes.c_int32(epilogue))
        if scales is not None:
            self._describe(FAST_ACCUMULATION, ctypes.c_int8(1))
            self._describe(A_SCALE_POINTER, ctypes.c_void_p(scales.product.data_ptr()))
            if scales.out is not None:
                self._describe(D_SCALE_POINTER, ctypes.c_void_p(scales.out.data_ptr()))
        self._layouts: dict[int, tuple[ctypes.c_void_p, ...]] = {}

    def __call__(self, a: Tensor, out: Tensor) -> None:
        """a (M, K) of the weight's type, out (M, N), contiguous."""
        if self.kind.algorithm is None:
            self.kind.algorithm = self._fastest(a, out)
        self._run(a, out, self.kind.algorithm)

    def _describe(self, attribute: int, value: Any) -> None:
        size = ctypes.c_size_t(ctypes.sizeof(value))
        reference = ctypes.byref(value)
        self.library.call(
            "MatmulDescSetAttribute", self.descriptor, ctypes.c_int(attribute), reference, size
        )

    def _run(self, a: Tensor, out: Tensor, algorithm: Any) -> None:
        weights, rows, added, result = self._layouts_for(a, out)
        pointer = ctypes.c_void_p(out.data_ptr())
        # What is added lies where the result will; nothing is added to one in float8.
        source = None if out.dtype == torch.float8_e4m3fn else pointer
        one = ctypes.c_float(1)
        self.library.call(
            "Matmul",
            *(self.library.handle, self.descriptor, ctypes.byref(one)),
            *(ctypes.c_void_p(self.weight.data_ptr()), weights),
            *(ctypes.c_void_p(a.data_ptr()), rows),
            *(ctypes.byref(self.beta), source, added, pointer, result),
            ctypes.byref(algorithm),
            ctypes.c_void_p(self.library.workspace.data_ptr()),
            ctypes.c_size_t(WORKSPACE_BYTES),
            ctypes.c_void_p(torch.cuda.current_stream(self.library.device).cuda_stream),
        )

    def _layouts_for(self, a: Tensor, out: Tensor) -> tuple[ctypes.c_void_p, ...]:
        """Layouts of weight, a, what is added (none is of float8) and out."""
        rows = len(a)
        if rows not in self._layouts:
            n, k = self.weight.shape
            added = torch.bfloat16 if out.dtype == torch.float8_e4m3fn else out.dtype
            made = []
            for height, width, dtype in (
                (k, n, self.weight.dtype),
                (k, rows, a.dtype),
                (n, rows, added),
                (n, rows, out.dtype),
            ):
                layout = ctypes.c_void_p()
                self.library.call(
                    "MatrixLayoutCreate",
                    ctypes.byref(layout),
                    ctypes.c_int(DATA_TYPES[dtype]),
                    *(ctypes.c_uint64(height), ctypes.c_uint64(width), ctypes.c_int64(height)),
                )
                made.append(layout)
            self._layouts[rows] = tuple(made)
        return self._layouts[rows]

    # ---- choice of the algorithm ----

    def _proposals(self, a: Tensor, out: Tensor) -> list[Any]:
        """Algorithms that do not split the sum, in cuBLASLt's own order."""
        call = self.library.call
        preference = ctypes.c_void_p()
        call("MatmulPreferenceCreate", ctypes.byref(preference))
        for attribute, value in (
            (MAX_WORKSPACE, ctypes.c_size_t(WORKSPACE_BYTES)),
            (REDUCTION_SCHEMES, ctypes.c_uint32(0)),  # none
        ):
            size = ctypes.c_size_t(ctypes.sizeof(value))
            arguments = (preference, ctypes.c_int(attribute), ctypes.byref(value), size)
            call("MatmulPreferenceSetAttribute", *arguments)
        found, count = (_Proposal * MOST_ALGORITHMS)(), ctypes.c_int()
        call(
            "MatmulAlgoGetHeuristic",
            *(self.library.handle, self.descriptor, *self._layouts_for(a, out), preference),
            *(ctypes.c_int(MOST_ALGORITHMS), found, ctypes.byref(count)),
        )
        call("MatmulPreferenceDestroy", preference)
        return [p.algorithm for p in found[: count.value] if p.state == 0]

    def _fastest(self, a: Tensor, out: Tensor) -> Any:
        """The fastest algorithm of those that agree with the first one; `out` is left as it was."""
        before = out.clone() if self.bias is None else out  # the bias overwrites
        reference: Tensor | None = None
        equal = []
        for algorithm in self._proposals(a, out):
            if before is not out:
                out.copy_(before)
            try:
                self._run(a, out, algorithm)
            except CublasLtError:
                continue
            if reference is None:
                reference = out.clone()
            if torch.equal(out.view(torch.int16), reference.view(torch.int16)):
                equal.append(algorithm)
        if not equal:
            raise CublasLtError(f"no algorithm for {tuple(a.shape)} x {tuple(self.weight.shape)}^T")
        milliseconds = [0.0] * len(equal)
        for _ in range(ROUNDS if len(equal) > 1 else 0):
            for i, algorithm in enumerate(equal):
                milliseconds[i] += self._time(a, out, algorithm)
        if before is not out:
            out.copy_(before)
        best = min(range(len(equal)), key=milliseconds.__getitem__)
        rates = [
            2e-9 * out.numel() * a.shape[1] * ROUNDS * REPEATS / (t or 1) for t in milliseconds
        ]
        log.info(
            "product %s x %s: algorithm %d of %d that agree, %.0f TFLOP/s (the first: %.0f)",
            *(tuple(a.shape), tuple(self.weight.shape), best, len(equal), rates[best], rates[0]),
        )
        return equal[best]

    def _time(self, a: Tensor, out: Tensor, algorithm: Any) -> float:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        for _ in range(REPEATS):
            self._run(a, out, algorithm)
        ended.record()
        ended.synchronize()
        return float(began.elapsed_time(ended))
