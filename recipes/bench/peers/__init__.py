"""What a user could assemble from others' parts, in the same run: the yardsticks of our ops.

Peers are treated kindly. What they need in another form (keys and values expanded to every head, dt a head, tables)
is made outside the clock; they read clips in raster order; a step counts in both of their directions, which saves
them a pass; the backward direction reads the clip's slice alone, so that they need no mask.
"""

from __future__ import annotations

from collections.abc import Iterator

from recipes.bench.peers.attention import ATTENTION_PEERS
from recipes.bench.peers.convolution import CONVOLUTION_PEERS
from recipes.bench.peers.peer import Peer
from recipes.bench.peers.scans import SCAN_PEERS

PEERS = (*SCAN_PEERS, *ATTENTION_PEERS, *CONVOLUTION_PEERS)
"""All peers."""


def peers_of(case: str) -> Iterator[Peer]:
    """Yield the peers that stand beside a case."""
    return (peer for peer in PEERS if case in peer.cases)
