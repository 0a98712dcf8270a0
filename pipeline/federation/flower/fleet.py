"""A node at a SuperLink's Fleet API: it is there, takes messages, and sends replies."""

from __future__ import annotations

import time
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from pipeline.disk import write_bytes
from pipeline.errors import ConfigError, NetworkError, first_line
from pipeline.federation.flower.link import Link, RefusedError

_HEARTBEAT_SECONDS = HEARTBEAT_DEFAULT_INTERVAL / 2
_RETRY_SECONDS = 0.1  # before a piece of a message is asked for again that is still on its way


class Fleet:
    """One node of a SuperLink.

    Every method raises NetworkError: UnreachableError where nobody answers, RefusedError where the
    SuperLink will not, or it is not to be trusted.
    """

    def __init__(self, link: Link, key: Path | None, memory: Path) -> None:
        """Prepare a node; nothing is sent yet.

        Args:
            key: the site's private key (OpenSSH, NIST curve), whose public one is registered; None
                makes one for this process, which a SuperLink takes that asks for no keys.
            memory: file in which the node's number is kept, by which a new process takes the place
                of one that died.
        """
        self._link, self._memory, self._registers = link, memory, key is None
        private = generate_key_pairs()[0] if key is None else _private_key(key)
        self._public = public_key_to_bytes(private.public_key())
        auth = NodeAuthHttpInterceptor(private, private.public_key())
        self._client = link.open(FleetHttpClient, "SuperNode", [auth])
        self._node = Node()
        self._heard = 0.0

    @property
    def number(self) -> int:
        """The node's number at the SuperLink."""
        return self._node.node_id

    def join(self) -> None:
        """Be there, in place of a process of this site that died and that seems to be there yet."""
        if self._registers:
            with self._link.reaching():
                self._client.RegisterNode(RegisterNodeFleetRequest(public_key=self._public))
            self._registers = False
        try:
            try:
                self._activate()
            except RefusedError:
                before = self._remembered()
                if before is None:
                    raise
                with self._link.reaching():
                    self._client.DeactivateNode(DeactivateNodeRequest(node_id=before))
                self._activate()
        except RefusedError as error:
            raise NetworkError(
                f"{error}; found a key that it does not take, or a node with this key that is "
                "there; expected a key that is registered: `flwr supernode register FILE.pub`"
            ) from error
        write_bytes(self._memory, str(self.number).encode())

    def _activate(self) -> None:
        request = ActivateNodeRequest(
            public_key=self._public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        with self._link.reaching():
            self._node = Node(node_id=self._client.ActivateNode(request).node_id)
        self._heard = time.monotonic()

    def _remembered(self) -> int | None:
        text = self._memory.read_text() if self._memory.is_file() else ""
        return int(text) if text.isdigit() else None

    def leave(self) -> None:
        """Say that the node is away."""
        with self._link.reaching():
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.number))

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def beat(self) -> None:
        """Say that the node is there, where that is due."""
        if time.monotonic() - self._heard < _HEARTBEAT_SECONDS:
            return
        interval = HEARTBEAT_DEFAULT_INTERVAL
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=interval)
        with self._link.reaching():
            known = self._client.SendNodeHeartbeat(request).success
        if not known:
            raise NetworkError(
                f"SuperLink {self._link.address}: it does not know this node any more; register "
                "its public key again, and start the node again"
            )
        self._heard = time.monotonic()

    def receive(self) -> Message | None:
        """Take the next message; None if there is none."""
        with self._link.reaching():
            response = self._client.PullMessages(PullMessagesRequest(node=self._node))
            if not response.messages_list:
                return None
            run_id = response.messages_list[0].metadata.run_id
            return self._whole(run_id, response.message_object_trees[0])

    def _whole(self, run_id: int, tree: ObjectTree) -> Message:
        """Bring all pieces of a message.

        Raises:
            ObjectPullError: they are not there, or no message.
        """
        pull = make_pull_object_fn_protobuf(self._client.PullObject, self._node, run_id)
        pieces = [piece.object_id for piece in iterate_object_tree(tree)]
        contents = pull_objects(pieces, pull, initial_backoff=_RETRY_SECONDS)
        try:
            message = inflate_object_from_contents(tree.object_id, contents)
        except Exception as error:  # many kinds: whoever may start runs may send any bytes
            raise ObjectPullError(tree.object_id, first_line(error)) from error
        if not isinstance(message, Message) or not message.has_content():
            raise ObjectPullError(tree.object_id, "it is no message with content")
        message.metadata.__dict__["_message_id"] = tree.object_id  # no message contains its own
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._node, run_id=run_id, message_object_id=tree.object_id
            )
        )
        return message

    def reply(self, reply: Message, seconds: float) -> None:
        """Send a reply, which took so long."""
        with self._link.reaching(), no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            response = self._client.PushMessages(
                PushMessagesRequest(
                    node=self._node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[get_object_tree(reply)],
                    clientapp_runtime_list=[seconds],
                )
            )
            push = make_push_object_fn_protobuf(
                self._client.PushObject, self._node, reply.metadata.run_id, response.session_id
            )
            wanted = set(response.objects_to_push)
            push_objects(get_all_nested_objects(reply), push, object_ids_to_push=wanted)


def _private_key(path: Path) -> EllipticCurvePrivateKey:
    """Read a private key.

    Raises:
        ConfigError: there is none of the right kind.
    """
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, UnsupportedAlgorithm, TypeError) as error:
        raise ConfigError(f"{path}: {_WRONG_KEY} (found none: {error})") from error
    if not isinstance(key, EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: {_WRONG_KEY} (found another kind)")
    return key


_WRONG_KEY = (
    "expected a private key as `ssh-keygen -t ecdsa -b 384 -N '' -f FILE` makes it; make one and "
    "let the server's administrator register FILE.pub"
)
