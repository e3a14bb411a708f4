"""JSON-RPC 2.0 over a Unix socket, as SPDK's programs have it: the wire, without the methods of disks."""

from ublk_trio.rpc.bounds import Bounds
from ublk_trio.rpc.client import DEFAULT_PATH, call
from ublk_trio.rpc.dispatcher import ANY_STATE, AnyParams, Dispatcher, Method, NoParams, State
from ublk_trio.rpc.errors import ErrorCode, NoServerError, RpcError
from ublk_trio.rpc.framework import FRAMEWORK_METHODS, Framework
from ublk_trio.rpc.server import RpcServer, RpcStatistics, serve_rpc

__all__ = [
    "ANY_STATE",
    "DEFAULT_PATH",
    "FRAMEWORK_METHODS",
    "AnyParams",
    "Bounds",
    "Dispatcher",
    "ErrorCode",
    "Framework",
    "Method",
    "NoParams",
    "NoServerError",
    "RpcError",
    "RpcServer",
    "RpcStatistics",
    "State",
    "call",
    "serve_rpc",
]
