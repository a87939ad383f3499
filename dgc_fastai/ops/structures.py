"""The structures that the C++ kernel is called with, as csrc/descriptors.h declares and explains them.

Pointers are addresses of contiguous tensors, which the caller keeps alive; None is a null pointer. `describe` tells
the names, offsets and sizes of all fields, as the kernel does of its own, so that loading it notices a difference.
"""

import ctypes
from ctypes import c_int64, c_void_p

__all__ = ["Axis", "BackwardArgs", "ConvDesc", "ForwardArgs", "PackArgs", "PackedLayer", "describe"]


class Axis(ctypes.Structure):
    _fields_ = [(name, c_int64) for name in ("size", "out", "taps", "stride", "padding", "dilation")]


class ConvDesc(ctypes.Structure):
    _fields_ = [
        *((name, c_int64) for name in ("batch", "heads", "channels", "filters", "grouped")),
        ("y", Axis),
        ("x", Axis),
    ]


class PackedLayer(ctypes.Structure):
    _fields_ = [
        ("weight", c_void_p),
        ("winograd_weight", c_void_p),
        ("bias", c_void_p),
        ("scale", c_void_p),
        ("shift", c_void_p),
        ("squeeze", c_void_p),
        ("excite", c_void_p),
        ("gate_bias", c_void_p),
        ("inactive", c_void_p),
        ("hidden", c_int64),
        ("granularity", c_int64),
        ("relu", c_int64),
    ]


class ForwardArgs(ctypes.Structure):
    _fields_ = [
        ("x", c_void_p),
        ("x_stride", c_int64),
        ("gates", c_void_p),
        ("residual", c_void_p),
        ("y", c_void_p),
        ("y_stride", c_int64),
    ]


class BackwardArgs(ctypes.Structure):
    _fields_ = [(name, c_void_p) for name in ("grad_y", "x", "gates", "grad_x", "grad_gates", "grad_weight", "scratch")]


class PackArgs(ctypes.Structure):
    _fields_ = [("weight", c_void_p), ("packed", c_void_p)]


def describe() -> str:
    """One line for each structure: its name, size, and the offset and size of each field, in bytes."""
    lines = []
    for structure in (Axis, ConvDesc, PackedLayer, ForwardArgs, BackwardArgs, PackArgs):
        fields = ((name, getattr(structure, name)) for name, *_ in structure._fields_)
        described = "".join(f" {name}={field.offset}+{field.size}" for name, field in fields)
        lines.append(f"{structure.__name__} {ctypes.sizeof(structure)}{described}\n")
    return "".join(lines)
