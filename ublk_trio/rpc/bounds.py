"""The bounds of a server."""

from __future__ import annotations

import attrs
from attrs.validators import ge, gt


@attrs.frozen(kw_only=True)
class Bounds:
    """How much a server takes on. What goes beyond waits, or is refused; docs/rpc.md says which."""

    #: Connections at once; further ones wait to be accepted.
    connections: int = attrs.field(default=64, validator=ge(1))
    #: Requests of one connection in progress at once, each until its answer is sent; further ones are not read.
    requests: int = attrs.field(default=32, validator=ge(1))
    #: Bytes of one request.
    request_bytes: int = attrs.field(default=256 << 10, validator=ge(2))
    #: Objects and arrays within each other in one request.
    nesting: int = attrs.field(default=64, validator=ge(1))
    #: Requests in one batch.
    batch: int = attrs.field(default=1024, validator=ge(1))
    #: Seconds from the first byte of a request to its last.
    request_seconds: float = attrs.field(default=30.0, validator=gt(0))
    #: Seconds that a client may take to read an answer.
    answer_seconds: float = attrs.field(default=30.0, validator=gt(0))
    #: Seconds that calls in progress have left when the server stops.
    grace_seconds: float = attrs.field(default=5.0, validator=ge(0))
