"""A token's DSA top-k indices stay together between pipeline stages.

With tensor parallelism, each rank of a stage sends a slice of its tensors, and the ranks
of the next stage gather the slices. The top-k kernels write a row's indices in no
particular order, in another on each rank: half a row of one rank and half a row of
another lack some indices and double others. Such rows go between stages since
https://github.com/sgl-project/sglang/pull/28532.

The real sending and receiving of tensor dictionaries, between stages of several ranks in
one process; the transport is a stub.
"""

import collections
import unittest
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import torch

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt.distributed.parallel_state import GroupCoordinator  # noqa: E402

register_cpu_ci(est_time=5, suite="stage-a-test-cpu")

HIDDEN_SIZE = 16
INDEX_TOPK = 8


class Wire:
    """Between a stage of ``tp_size`` ranks and the next one."""

    def __init__(self, tp_size):
        self.tp_size = tp_size
        self.objects = [collections.deque() for _ in range(tp_size)]
        self.tensors = [collections.deque() for _ in range(tp_size)]
        self.group = object.__new__(GroupCoordinator)
        vars(self.group).update(
            world_size=2, rank_in_group=0, ranks=[0, 1], device_group=0, cpu_group=0
        )

    def tp_group(self, rank):
        return SimpleNamespace(
            world_size=self.tp_size,
            rank_in_group=rank,
            all_gather=lambda tensor, dim: torch.cat(self.of_all_ranks.popleft()),
        )

    def send(self, rank, tensors):
        def send_object(group, obj, *args, **kwargs):
            self.objects[rank].append(obj)
            return []

        def send_tensor(tensor, *args, **kwargs):
            self.tensors[rank].append(tensor.clone())

        with (
            patch.object(GroupCoordinator, "send_object", send_object),
            patch("torch.distributed.isend", send_tensor),
        ):
            self.group.send_tensor_dict(
                tensors, all_gather_group=self.tp_group(rank), async_send=True
            )

    def receive(self, rank):
        sent = iter(zip(*self.tensors))

        def receive_object(group, *args, **kwargs):
            return self.objects[rank].popleft()

        def receive_tensor(tensor, *args, **kwargs):
            slices = next(sent)
            tensor.copy_(slices[rank])
            self.of_all_ranks = collections.deque([slices])
            return MagicMock()

        with (
            patch.object(GroupCoordinator, "recv_object", receive_object),
            patch("torch.distributed.irecv", receive_tensor),
            patch("torch.distributed.is_initialized", lambda: True),
        ):
            return self.group.recv_tensor_dict(all_gather_group=self.tp_group(rank))

    def exchange(self, rank, tensors):
        """Both at once, with a stage whose ranks have sent the same as those here."""
        sent = iter(zip(*self.tensors))
        self.of_all_ranks = collections.deque()

        def batch_isend_irecv(operations):
            """Of what describes the tensors, twice, then of all the tensors."""
            send, receive = (
                [each.tensor for each in operations if each.op == op]
                for op in ("isend", "irecv")
            )
            for to, of in zip(receive, send, strict=True):
                if of.dtype not in (torch.long, torch.uint8):
                    slices = next(sent)
                    torch.testing.assert_close(of, slices[rank])
                    if of.dim() == 1:
                        self.of_all_ranks.append(slices)
                to.copy_(of)
            return []

        def operation(op, tensor, *args, **kwargs):
            return SimpleNamespace(op=op, tensor=tensor)

        with (
            patch("torch.distributed.P2POp", operation),
            patch("torch.distributed.isend", "isend"),
            patch("torch.distributed.irecv", "irecv"),
            patch("torch.distributed.batch_isend_irecv", batch_isend_irecv),
            patch("torch.distributed.is_initialized", lambda: True),
        ):
            return self.group.send_recv_tensor_dict(
                tensors,
                send_all_gather_group=self.tp_group(rank),
                recv_all_gather_group=self.tp_group(rank),
            )


class TestRows(CustomTestCase):
    def check(self, receive):
        for tp_size in (1, 2, 4):
            for num_tokens in (1, 2, 3, 4, 8, 12):
                self.check_batch(num_tokens, tp_size, receive)

    def check_batch(self, num_tokens, tp_size, receive):
        generator = torch.Generator().manual_seed(num_tokens)
        hidden_states = torch.randn(num_tokens, HIDDEN_SIZE, generator=generator)
        wire = Wire(tp_size)
        tensors = []
        for rank in range(tp_size):
            rows = [
                100 * token + torch.randperm(INDEX_TOPK, generator=generator)
                for token in range(num_tokens)
            ]
            tensors.append(
                {
                    "hidden_states": hidden_states,
                    "residual": -hidden_states,
                    "topk_indices": torch.stack(rows).int(),
                    "__msg_type__": "proxy",
                }
            )
            wire.send(rank, tensors[rank])
        num_sent = [tensor.numel() for tensor in wire.tensors[0]]
        self.assertEqual(
            num_sent[:2],
            [num_tokens * HIDDEN_SIZE // tp_size] * 2,
            "hidden states not in slices",
        )
        for rank in range(tp_size):
            received = receive(wire, rank, tensors[rank])
            torch.testing.assert_close(received["hidden_states"], hidden_states)
            torch.testing.assert_close(received["residual"], -hidden_states)
            topk_indices = received["topk_indices"]
            self.assertEqual(topk_indices.dtype, torch.int32)
            for token, row in enumerate(topk_indices.tolist()):
                self.assertEqual(
                    sorted(row),
                    [100 * token + i for i in range(INDEX_TOPK)],
                    f"{num_tokens} tokens, {tp_size} ranks: the indices of token {token} "
                    "were put together from those of several ranks",
                )
        slices = tp_size if num_tokens % tp_size == 0 else 1
        self.assertEqual(num_sent[2], num_tokens * INDEX_TOPK // slices)

    def check_slices(self, tensor, num_sent):
        """What each of two ranks sends of a tensor that they have alike."""
        wire = Wire(2)
        for rank in range(2):
            wire.send(rank, {"tensor": tensor})
        sent = [each.numel() for each in wire.tensors[0]]
        self.assertEqual(sent, num_sent, f"{tensor} was not cut where it should be")
        for rank in range(2):
            torch.testing.assert_close(wire.receive(rank)["tensor"], tensor)

    def test_other_tensors(self):
        """In slices where they can be shared out evenly, as ever."""
        self.check_slices(torch.arange(4), [2])
        self.check_slices(torch.arange(3), [3])
        self.check_slices(torch.tensor(7), [1])
        self.check_slices(torch.tensor([True, False, True, True]), [2])
        self.check_slices(torch.zeros(0, INDEX_TOPK, dtype=torch.int32), [])
        self.check_slices(torch.arange(6.0).reshape(3, 2), [3])
        self.check_slices(torch.arange(3.0), [3])

    def test_rows_of_integers(self):
        self.check_slices(torch.arange(6).reshape(3, 2), [6])
        self.check_slices(torch.tensor([[True, False]] * 3), [6])
        self.check_slices(torch.arange(8).reshape(4, 2), [4])

    def test_send_and_receive(self):
        self.check(lambda wire, rank, tensors: wire.receive(rank))

    @unittest.skipUnless(
        hasattr(GroupCoordinator, "send_recv_tensor_dict"), "stages do not exchange"
    )
    def test_exchange(self):
        self.check(lambda wire, rank, tensors: wire.exchange(rank, tensors))


if __name__ == "__main__":
    unittest.main()
