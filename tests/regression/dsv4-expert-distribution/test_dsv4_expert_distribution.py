"""The expert distribution recorder has to see every layer of DeepSeek-V4.

The recorder attributes selected experts to the layer whose context is entered, and
it learns of them from the routing code. DeepseekV4Model.forward has to enter that
context around each layer, and HashTopK has to report what it selects as the other
routing functions do. Otherwise recording crashes for lack of a layer, and the
statistics miss the hash layers (https://github.com/sgl-project/sglang/pull/25948).
"""

import inspect
import tempfile
import unittest
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

from sglang.test.ci.ci_register import register_cpu_ci
from sglang.test.test_utils import CustomTestCase, maybe_stub_sgl_kernel

maybe_stub_sgl_kernel()

from sglang.srt import server_args as server_args_module  # noqa: E402
from sglang.srt.environ import envs  # noqa: E402
from sglang.srt.eplb import expert_distribution, expert_location  # noqa: E402
from sglang.srt.eplb.expert_distribution import (  # noqa: E402
    ExpertDistributionRecorder,
)
from sglang.srt.eplb.expert_location import ExpertLocationMetadata  # noqa: E402
from sglang.srt.eplb.expert_location_dispatch import (  # noqa: E402
    ExpertLocationDispatchInfo,
)
from sglang.srt.layers.moe import topk as topk_module  # noqa: E402
from sglang.srt.layers.moe.topk import TopKConfig, select_experts  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from sglang.srt.server_args import ServerArgs  # noqa: E402

HAS_DEEPSEEK_V4 = find_spec("sglang.srt.models.deepseek_v4") is not None
if HAS_DEEPSEEK_V4:
    from sglang.srt.layers.moe.hash_topk import HashTopK
    from sglang.srt.models import deepseek_v4, deepseek_v4_nextn
    from sglang.srt.models.deepseek_v4 import DeepseekV4DecoderLayer, DeepseekV4Model
    from sglang.srt.models.deepseek_v4_nextn import DeepseekV4ModelNextN

    # Since 0.5.13 a layer hands on more than the hidden states.
    LAYERS_RETURN_TUPLES = (
        "prev_residual" in inspect.signature(DeepseekV4DecoderLayer.forward).parameters
    )

register_cpu_ci(est_time=6, suite="stage-a-test-cpu")

VOCAB_SIZE = 32
HIDDEN_SIZE = 4
HC_MULT = 2
TOPK = 3
NUM_LOGICAL_EXPERTS = 8
NUM_REDUNDANT_EXPERTS = 4
# DeepSeek-V4's own shape: the first layers route by token id, the others by score.
HASH_THEN_SCORED = ("hash", "hash", "scored", "scored")
ALL_HASH = ("hash",) * 4


def routing_table(layer_id: int) -> torch.Tensor:
    """The experts of each token id in a layer: distinct ones, other in each layer."""
    generator = torch.Generator().manual_seed(layer_id)
    return torch.stack(
        [
            torch.randperm(NUM_LOGICAL_EXPERTS, generator=generator)[:TOPK]
            for _ in range(VOCAB_SIZE)
        ]
    ).int()


def counts(expert_ids: torch.Tensor, num_experts: int):
    return torch.bincount(expert_ids.flatten().long(), minlength=num_experts).tolist()


def physical_to_logical_maps(num_layers: int, num_redundant_experts: int):
    """Which logical expert each physical one is: some have replicas, none its place.

    Without redundant experts it is the trivial map.
    """
    if num_redundant_experts == 0:
        return torch.arange(NUM_LOGICAL_EXPERTS).repeat(num_layers, 1)
    generator = torch.Generator().manual_seed(num_layers)
    maps = []
    for _ in range(num_layers):
        replicas = torch.randperm(NUM_LOGICAL_EXPERTS, generator=generator)
        experts = torch.cat(
            [torch.arange(NUM_LOGICAL_EXPERTS), replicas[:num_redundant_experts]]
        )
        maps.append(experts[torch.randperm(len(experts), generator=generator)])
    return torch.stack(maps)


def expert_location_metadata(num_layers: int, num_redundant_experts: int):
    physical_to_logical = physical_to_logical_maps(num_layers, num_redundant_experts)
    num_physical_experts = physical_to_logical.shape[1]
    to_all = torch.full((num_layers, NUM_LOGICAL_EXPERTS, num_physical_experts), -1)
    num_valid = torch.zeros(num_layers, NUM_LOGICAL_EXPERTS, dtype=torch.int64)
    for layer in range(num_layers):
        for physical, logical in enumerate(physical_to_logical[layer].tolist()):
            to_all[layer, logical, num_valid[layer, logical]] = physical
            num_valid[layer, logical] += 1
    # This rank sends to the last replica.
    dispatch = to_all.gather(2, num_valid.unsqueeze(2) - 1).squeeze(2)
    return ExpertLocationMetadata(
        physical_to_logical_map=physical_to_logical,
        physical_to_logical_map_cpu=physical_to_logical,
        logical_to_all_physical_map=to_all,
        logical_to_all_physical_map_cpu=to_all,
        logical_to_all_physical_map_num_valid=num_valid,
        logical_to_rank_dispatch_physical_map=dispatch,
    )


class RoutingLayer(nn.Module):
    """A decoder layer reduced to its real routing, told beforehand what to choose.

    A hash layer has the routing table itself. The other kind gets router logits that
    favour the same experts.
    """

    def __init__(self, layer_id: int, kind: str):
        super().__init__()
        self.layer_id = layer_id
        self.table = routing_table(layer_id)
        self.selected = []
        if kind == "hash":
            self.hash_topk = HashTopK(
                topk=TOPK,
                num_experts=NUM_LOGICAL_EXPERTS,
                num_fused_shared_experts=0,
                vocab_size=VOCAB_SIZE,
            )
            self.hash_topk.tid2eid.data.copy_(self.table)
        else:
            self.hash_topk = None

    def forward(
        self,
        positions,
        hidden_states,
        forward_batch,
        input_ids,
        input_ids_global,
        **kwargs,
    ):
        router_logits = torch.full((len(input_ids), NUM_LOGICAL_EXPERTS), -4.0)
        router_logits.scatter_(1, self.table[input_ids].long(), 4.0)
        routing = dict(
            hidden_states=hidden_states.flatten(1),
            router_logits=router_logits,
            num_token_non_padded=forward_batch.num_token_non_padded,
            expert_location_dispatch_info=ExpertLocationDispatchInfo.init_new(
                layer_id=self.layer_id
            ),
        )
        if self.hash_topk is not None:
            output = self.hash_topk(input_ids=input_ids_global, **routing)
        else:
            topk_config = TopKConfig(
                top_k=TOPK,
                scoring_func="sqrtsoftplus",
                correction_bias=torch.zeros(NUM_LOGICAL_EXPERTS),
            )
            output = select_experts(
                layer_id=self.layer_id, topk_config=topk_config, **routing
            )
        self.selected.append(output.topk_ids.clone())
        if LAYERS_RETURN_TUPLES:
            return hidden_states, None, None, None
        return hidden_states


class ReturnsTuple(nn.Module):
    def forward(self, x):
        return x, None


def build_model(kinds, start_layer=0):
    """DeepseekV4Model as it is, but for what needs weights, a GPU or other ranks."""
    model = DeepseekV4Model.__new__(DeepseekV4Model)
    nn.Module.__init__(model)
    model.pp_group = SimpleNamespace(
        is_first_rank=start_layer == 0, is_last_rank=True, world_size=1
    )
    model.embed_tokens = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
    model.layers = nn.ModuleList(
        RoutingLayer(layer_id, kind) if layer_id >= start_layer else nn.Identity()
        for layer_id, kind in enumerate(kinds)
    )
    model.start_layer, model.end_layer = start_layer, len(kinds)
    model.hidden_size, model.hc_mult = HIDDEN_SIZE, HC_MULT
    model.use_fused_mhc_post_pre = False
    model.norm = nn.Identity()
    replace_hc_head(model)
    return model


def build_nextn_model():
    """The next-token model likewise: its one layer has the layer id 0."""
    model = DeepseekV4ModelNextN.__new__(DeepseekV4ModelNextN)
    nn.Module.__init__(model)
    model.config = SimpleNamespace(hidden_size=HIDDEN_SIZE)
    model.hc_mult = HC_MULT
    model.embed_tokens = nn.Embedding(VOCAB_SIZE, HIDDEN_SIZE)
    model.enorm, model.hnorm = nn.Identity(), nn.Identity()
    model.e_proj, model.h_proj = ReturnsTuple(), ReturnsTuple()
    model.decoder = RoutingLayer(0, "scored")
    model.shared_head = nn.Module()
    model.shared_head.norm = nn.Identity()
    replace_hc_head(model)
    return model


def replace_hc_head(model):
    model.hc_head_fn = model.hc_head_base = model.hc_head_scale = None
    model.hc_head = lambda x, *args: x.mean(dim=1)


class LayerContexts(ExpertDistributionRecorder):
    """Notes which layers' contexts are entered."""

    def __init__(self):
        self.entered = []

    @contextmanager
    def with_current_layer(self, layer_idx):
        self.entered.append(layer_idx)
        yield


def set_piecewise_cuda_graphs(server_args, enabled):
    try:  # since 0.5.14
        from sglang.srt.model_executor.cuda_graph_config import CudaGraphConfig
    except ImportError:
        server_args.disable_piecewise_cuda_graph = not enabled
    else:
        prefill = {"backend": "tc_piecewise" if enabled else "disabled"}
        server_args.cuda_graph_config = CudaGraphConfig.from_dict({"prefill": prefill})


@contextmanager
def one_rank():
    """Says that there are no other ranks; since 0.5.14 one place says it."""
    try:
        from sglang.srt.runtime_context import get_parallel
    except ImportError:
        with (
            patch.object(deepseek_v4, "get_attention_dp_size", lambda: 1),
            patch.object(deepseek_v4_nextn, "get_attention_dp_size", lambda: 1),
        ):
            yield
    else:
        with get_parallel().override(attn_dp_size=1):
            yield


def global_server_args(server_args):
    """As the process-wide arguments; since 0.5.15 they lie in a context."""
    if hasattr(server_args_module, "_global_server_args"):
        return patch.object(server_args_module, "_global_server_args", server_args)
    from sglang.srt.runtime_context import get_context

    return patch.object(get_context(), "_server_args", server_args)


class RecorderTestCase(CustomTestCase):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.owns_process_group = not dist.is_initialized()
        if cls.owns_process_group:
            dist.init_process_group(
                "gloo", store=dist.HashStore(), rank=0, world_size=1
            )

    @classmethod
    def tearDownClass(cls):
        if cls.owns_process_group:
            dist.destroy_process_group()
        super().tearDownClass()

    def setUp(self):
        super().setUp()
        self.is_capturing = False
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        self.dump_directory = Path(directory.name)
        gpu = SimpleNamespace(
            is_current_stream_capturing=lambda: self.is_capturing,
            empty_cache=lambda: None,
        )
        for context in (
            # What a GPU would be.
            patch.object(torch, "get_device_module", lambda *args: gpu),
            patch.object(expert_distribution, "get_device", lambda: "cpu"),
            patch.object(topk_module, "_is_cuda", False),
            # A kernel for them all since 0.5.14.
            patch.object(
                topk_module, "_can_fuse_padded_region", lambda x: False, create=True
            ),
            envs.SGLANG_OPT_USE_FUSED_HASH_TOPK.override(False),
            envs.SGLANG_OPT_USE_JIT_KERNEL_FUSED_TOPK.override(False),
            torch.compiler.set_stance("force_eager"),
            # What other ranks would be.
            one_rank(),
            envs.SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR.override(directory.name),
            # The process-wide state.
            global_server_args(None),
            patch.object(expert_location, "_global_expert_location_metadata", None),
            patch.object(
                expert_distribution, "_global_expert_distribution_recorder", None
            ),
        ):
            context.__enter__()
            self.addCleanup(context.__exit__, None, None, None)

    def init_recorder(
        self,
        num_layers: int,
        mode: str = "stat",
        num_redundant_experts: int = 0,
        disable_piecewise_cuda_graph: bool = True,
    ):
        server_args = ServerArgs(
            model_path="dummy",
            device="cpu",
            expert_distribution_recorder_mode=mode,
            expert_distribution_recorder_buffer_size=-1,
            chunked_prefill_size=8,
            ep_dispatch_algorithm="static" if num_redundant_experts else None,
        )
        set_piecewise_cuda_graphs(server_args, not disable_piecewise_cuda_graph)
        server_args_module.set_global_server_args_for_scheduler(server_args)
        self.metadata = expert_location_metadata(num_layers, num_redundant_experts)
        expert_location.set_global_expert_location_metadata(self.metadata)
        self.recorder = ExpertDistributionRecorder.init_new(
            server_args, self.metadata, rank=0
        )
        expert_distribution.set_global_expert_distribution_recorder(self.recorder)

    def forward_batch(self, input_ids, num_token_non_padded=None):
        if num_token_non_padded is not None:
            num_token_non_padded = torch.tensor(num_token_non_padded)
        num_tokens = len(input_ids)
        return SimpleNamespace(
            forward_mode=ForwardMode.EXTEND,
            input_ids=input_ids,
            positions=torch.arange(num_tokens),
            extend_seq_lens_cpu=[num_tokens],
            num_token_non_padded=num_token_non_padded,
            attn_cp_metadata=None,
            spec_info=SimpleNamespace(
                hidden_states=torch.zeros(num_tokens, HC_MULT * HIDDEN_SIZE)
            ),
        )

    def run_pass(self, model, input_ids, num_token_non_padded=None):
        """A forward pass as ModelRunner.forward runs it."""
        batch = self.forward_batch(input_ids, num_token_non_padded)
        kwargs = {}
        if isinstance(model, DeepseekV4Model) and not model.pp_group.is_first_rank:
            hidden_states = torch.zeros(len(input_ids), HC_MULT * HIDDEN_SIZE)
            kwargs["pp_proxy_tensors"] = {"hidden_states": hidden_states}
        try:
            with self.recorder.with_forward_pass(0, batch), torch.no_grad():
                model.forward(input_ids, batch.positions, batch, None, **kwargs)
        except RuntimeError as e:
            self.fail(f"the recorder crashed the forward pass: {e}")

    def dump_counts(self):
        """The recorded (layers, logical experts) counts of mode stat."""
        logical_count = self.recorder.dump_record("object")["logical_count"]
        return logical_count.sum(dim=0)

    def dump_records(self):
        """The recorded passes of the other modes."""
        self.recorder.dump_record("file")
        (path,) = self.dump_directory.glob("*.pt")
        return torch.load(path)["records"]

    def assert_counts(self, recorded, expert_ids_of_layer, what="recorded"):
        """Each layer has counted the given expert ids and nothing else."""
        for layer, expert_ids in enumerate(expert_ids_of_layer):
            total = recorded[layer].sum().item()
            self.assertEqual(
                total,
                expert_ids.numel(),
                f"{what}: {total} selected experts in layer {layer}, it has "
                f"{len(expert_ids)} tokens x {TOPK} experts",
            )
            self.assertEqual(
                recorded[layer].tolist(),
                counts(expert_ids, len(recorded[layer])),
                f"{what}: layer {layer} has counted other experts",
            )


INPUT_IDS = torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5, 31, 0])
NO_TOKENS = torch.zeros(0, TOPK)
SKIP_REASON = "this release has no DeepSeek-V4"


@unittest.skipUnless(HAS_DEEPSEEK_V4, SKIP_REASON)
class TestHashTopKReportsExperts(RecorderTestCase):
    """HashTopK alone, inside of its layer's context."""

    def run_layers(self, input_ids, num_token_non_padded=None, num_layers=3):
        layers = [RoutingLayer(layer_id, "hash") for layer_id in range(num_layers)]
        batch = self.forward_batch(input_ids, num_token_non_padded)
        with self.recorder.with_forward_pass(0, batch):
            for layer in layers:
                with self.recorder.with_current_layer(layer.layer_id):
                    layer(
                        batch.positions,
                        torch.zeros(len(input_ids), HIDDEN_SIZE),
                        batch,
                        input_ids,
                        input_ids,
                    )
        return layers

    def test_every_selected_expert_is_counted(self):
        self.init_recorder(num_layers=3)
        self.recorder.start_record()
        layers = self.run_layers(INPUT_IDS)
        self.assert_counts(
            self.dump_counts(), [layer.table[INPUT_IDS] for layer in layers]
        )

    def test_padding_is_not_counted(self):
        self.init_recorder(num_layers=3)
        self.recorder.start_record()
        layers = self.run_layers(INPUT_IDS, num_token_non_padded=7)
        self.assert_counts(
            self.dump_counts(),
            [layer.table[INPUT_IDS[:7]] for layer in layers],
            "recorded with 4 padded tokens",
        )

    def test_physical_experts_are_counted(self):
        self.init_recorder(3, "per_pass", NUM_REDUNDANT_EXPERTS)
        self.recorder.start_record()
        layers = self.run_layers(INPUT_IDS)
        (record,) = self.dump_records()
        dispatch = self.metadata.logical_to_rank_dispatch_physical_map
        self.assert_counts(
            record["global_physical_count"],
            [dispatch[layer.layer_id][layer.table[INPUT_IDS]] for layer in layers],
            "recorded physical experts",
        )

    def test_logical_counts_see_through_the_mapping(self):
        self.init_recorder(3, "stat", NUM_REDUNDANT_EXPERTS)
        self.recorder.start_record()
        layers = self.run_layers(INPUT_IDS, num_token_non_padded=7)
        self.assert_counts(
            self.dump_counts(), [layer.table[INPUT_IDS[:7]] for layer in layers]
        )

    def test_reported_ids_are_the_returned_ids(self):
        self.init_recorder(3, "per_token", NUM_REDUNDANT_EXPERTS)
        self.recorder.start_record()
        layers = self.run_layers(INPUT_IDS, num_token_non_padded=7)
        (record,) = self.dump_records()
        for layer in layers:
            self.assertEqual(
                record["topk_ids_of_layer"][layer.layer_id][:, :TOPK].tolist(),
                layer.selected[0].tolist(),
                f"layer {layer.layer_id} reported other expert ids than it returned",
            )
        self.assertTrue((layers[0].selected[0][7:] == -1).all())


@unittest.skipUnless(HAS_DEEPSEEK_V4, SKIP_REASON)
class TestDeepseekV4ModelIsRecorded(RecorderTestCase):
    """The model's own loop over its layers."""

    def check_every_layer_is_counted(self, kinds):
        self.init_recorder(num_layers=len(kinds))
        model = build_model(kinds)
        self.recorder.start_record()
        self.run_pass(model, INPUT_IDS)
        self.assert_counts(
            self.dump_counts(), [layer.table[INPUT_IDS] for layer in model.layers]
        )

    def test_every_layer_is_counted(self):
        self.check_every_layer_is_counted(HASH_THEN_SCORED)

    def test_every_hash_layer_is_counted(self):
        self.check_every_layer_is_counted(ALL_HASH)

    def test_passes_add_up(self):
        self.init_recorder(num_layers=4)
        model = build_model(HASH_THEN_SCORED)
        self.recorder.start_record()
        for input_ids in (INPUT_IDS, INPUT_IDS[:1], INPUT_IDS.flip(0)):
            self.run_pass(model, input_ids)
        seen = torch.cat([INPUT_IDS, INPUT_IDS[:1], INPUT_IDS])
        self.assert_counts(
            self.dump_counts(), [layer.table[seen] for layer in model.layers]
        )

    def test_each_token_is_recorded_in_its_layer(self):
        self.init_recorder(4, "per_token")
        model = build_model(HASH_THEN_SCORED)
        self.recorder.start_record()
        self.run_pass(model, INPUT_IDS)
        (record,) = self.dump_records()
        for layer in model.layers:
            recorded = record["topk_ids_of_layer"][layer.layer_id][:, :TOPK]
            self.assertEqual(
                recorded.sort(dim=1).values.tolist(),
                layer.table[INPUT_IDS].sort(dim=1).values.tolist(),
                f"layer {layer.layer_id} recorded other expert ids than it selected",
            )

    def test_padding_is_not_counted(self):
        self.init_recorder(4, "stat", NUM_REDUNDANT_EXPERTS)
        model = build_model(ALL_HASH)
        self.recorder.start_record()
        self.run_pass(model, INPUT_IDS, num_token_non_padded=7)
        self.assert_counts(
            self.dump_counts(), [layer.table[INPUT_IDS[:7]] for layer in model.layers]
        )

    def test_nothing_is_counted_while_not_recording(self):
        self.init_recorder(num_layers=4)
        model = build_model(HASH_THEN_SCORED)
        self.run_pass(model, INPUT_IDS)
        self.recorder.start_record()
        self.run_pass(model, INPUT_IDS[:2])
        self.recorder.stop_record()
        self.run_pass(model, INPUT_IDS)
        self.assert_counts(
            self.dump_counts(), [layer.table[INPUT_IDS[:2]] for layer in model.layers]
        )

    def test_cuda_graph_capture_without_recording(self):
        """A capture bakes the reports into the graph, and so it runs them."""
        self.init_recorder(num_layers=4)
        model = build_model(HASH_THEN_SCORED)
        self.is_capturing = True
        self.run_pass(model, INPUT_IDS)
        self.is_capturing = False
        self.recorder.start_record()
        self.run_pass(model, INPUT_IDS[:2])
        self.assert_counts(
            self.dump_counts(), [layer.table[INPUT_IDS[:2]] for layer in model.layers]
        )

    def test_pipeline_stage_counts_its_own_layers(self):
        self.init_recorder(num_layers=4)
        model = build_model(HASH_THEN_SCORED, start_layer=1)
        self.recorder.start_record()
        self.run_pass(model, INPUT_IDS)
        self.assert_counts(
            self.dump_counts(),
            [NO_TOKENS] + [layer.table[INPUT_IDS] for layer in model.layers[1:]],
        )

    def entered_layer_contexts(self, disable_piecewise_cuda_graph):
        self.init_recorder(
            num_layers=4, disable_piecewise_cuda_graph=disable_piecewise_cuda_graph
        )
        self.recorder = LayerContexts()
        expert_distribution.set_global_expert_distribution_recorder(self.recorder)
        model = build_model(HASH_THEN_SCORED)
        self.run_pass(model, INPUT_IDS)
        for layer in model.layers:
            self.assertEqual(len(layer.selected), 1)
        return self.recorder.entered

    def test_each_layer_runs_in_its_context(self):
        self.assertEqual(
            self.entered_layer_contexts(disable_piecewise_cuda_graph=True),
            [0, 1, 2, 3],
            "the recorder is not told the current layer",
        )

    def test_no_layer_context_with_piecewise_cuda_graphs(self):
        """torch dynamo cannot break a piecewise graph inside of a context manager."""
        self.assertEqual(
            self.entered_layer_contexts(disable_piecewise_cuda_graph=False),
            [],
            "a context manager is entered where piecewise CUDA graphs are enabled",
        )


@unittest.skipUnless(HAS_DEEPSEEK_V4, SKIP_REASON)
class TestDeepseekV4NextNIsNotRecorded(RecorderTestCase):
    """The next-token layer is no layer of the statistics, its id 0 notwithstanding."""

    def test_draft_passes_are_not_counted(self):
        self.init_recorder(num_layers=4)
        target, draft = build_model(HASH_THEN_SCORED), build_nextn_model()
        self.recorder.start_record()
        self.run_pass(target, INPUT_IDS)
        self.run_pass(draft, INPUT_IDS)
        self.run_pass(target, INPUT_IDS)
        self.assertEqual(len(draft.decoder.selected), 1)
        seen = torch.cat([INPUT_IDS, INPUT_IDS])
        self.assert_counts(
            self.dump_counts(),
            [layer.table[seen] for layer in target.layers],
            "recorded next to draft passes",
        )

    def test_cuda_graph_capture_of_the_draft_model(self):
        self.init_recorder(num_layers=4)
        draft = build_nextn_model()
        self.is_capturing = True
        self.run_pass(draft, INPUT_IDS)
        self.assertEqual(len(draft.decoder.selected), 1)


if __name__ == "__main__":
    unittest.main()
