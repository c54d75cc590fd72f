"""The state that is carried from task to task: one quadratic that stands for all tasks so far."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_ewc.importance import Fisher
from hf_ewc.parameters import sharding
from hf_ewc.parameters.adapters import differentiable, weights_named
from hf_ewc.parameters.names import canonical_name
from hf_ewc.parameters.selection import names_in
from hf_ewc.processes import is_main_process as is_main
from hf_ewc.state import card, fingerprint, fit, growing, hub, merging, packing, renaming, storage
from hf_ewc.state.compatibility import validate
from hf_ewc.state.consolidation import Consolidation, Parameters, Settings
from hf_ewc.state.packed import PackedTensor, TensorMap
from hf_ewc.state.quadratic import half_square, sum_of
from hf_ewc.state.records import ReadOnly, TaskRecord, as_json, check_records
from hf_ewc.state.told_lambda import told_lambda, told_layer_lambdas

__all__ = ["EWCState", "TaskRecord"]


@dataclass(frozen=True, init=False)
class EWCState:
    """Importance A, anchor c and offset of ½ Σ_i A_i (θ_i − c_i)² + offset, an immutable value.

    One such quadratic stands exactly for the sum of the penalties ½ Σ_k w_k F_k (θ − θ*_k)² of any
    number of tasks (`consolidate`). `EWCState()` is the empty state, whose penalty is 0. What the
    fields hand out are copies: changing them does not change the state.

    Args:
        importance: A by parameter name, at least 0, read in fp32; tensors given are copied.
        anchor: c by parameter name, shaped as A, held in its own dtype, read in fp32 or fp64.
        offsets: the constant by parameter name, 0 where none is given.
        tasks: what was consolidated, in order.
        metadata: further facts, as JSON would hold them, such as the fingerprint of the base model.

    Names are those of the unwrapped model, without the parts that wrappers put in.

    Raises:
        ValueError: an importance is below 0 or not finite, an anchor is not finite, the names or
            shapes of both differ, an offset is below 0, not finite or of an unknown name, or the
            metadata are not JSON.
        TypeError: an entry is not a floating-point tensor, or a task is no `TaskRecord`.
    """

    importance: TensorMap
    anchor: TensorMap
    offsets: Mapping[str, float]
    tasks: tuple[TaskRecord, ...]
    metadata: Mapping[str, Any]

    def __init__(
        self,
        importance: Mapping[str, Tensor] | None = None,
        anchor: Mapping[str, Tensor] | None = None,
        offsets: Mapping[str, float] | None = None,
        tasks: Sequence[TaskRecord] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        strengths = TensorMap.of("importance", importance or {}, torch.float32)
        centers = TensorMap.of("anchor", anchor or {}, None)
        constants = {canonical_name(key): float(value) for key, value in (offsets or {}).items()}
        validate(strengths, centers, constants)
        check_records(tasks)
        facts = as_json(metadata or {})
        fingerprint.refuse_malformed(facts.get("fingerprint"))
        self.__dict__.update(
            importance=strengths,
            anchor=centers,
            offsets=ReadOnly({name: constants.get(name, 0.0) for name in strengths}),
            tasks=tuple(tasks),
            metadata=ReadOnly(facts),
        )

    def __bool__(self) -> bool:
        """False for the empty state, which protects nothing."""
        return len(self.importance) > 0

    @property
    def offset(self) -> float:
        """The constant of the quadratic: the penalty of all tasks together at the anchor."""
        return math.fsum(self.offsets.values())

    @property
    def num_tasks(self) -> int:
        """How many tasks were consolidated."""
        return len(self.tasks)

    def told_lambda(self) -> float:
        """λ where nobody gives one, min(0.4 / (g ρ²), 1e4): see `hf_ewc.state.told_lambda`."""
        return told_lambda(self.importance, self.num_tasks)

    def told_layer_lambdas(self) -> dict[str, float]:
        """For each parameter the λ of its layer alone, as `ewc_layer_lambdas` takes it."""
        return told_layer_lambdas(self.importance, self.num_tasks)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that this process holds; sparse positions are counted once."""
        anchors = (self.anchor.packed(name).values for name in self.anchor)
        return self.importance.nbytes + sum(sharding.local_part(c).nbytes for c in anchors)

    def packed(self, name: str) -> tuple[PackedTensor, PackedTensor]:
        """Importance and anchor of one parameter as they are held; sparse ones share `indices`."""
        return self.importance.packed(name), self.anchor.packed(name)

    def consolidate(
        self,
        fisher: Fisher,
        parameters: Parameters,
        *,
        mode: str = "online",
        gamma: float = 1.0,
        weight: float = 1.0,
        name: str | None = None,
        dtype: torch.dtype | str = torch.float32,
        keep_fraction: float = 1.0,
        device: torch.device | str | None = None,
    ) -> EWCState:
        """The state after one more task with Fisher F and parameters θ*.

        separate (Kirkpatrick et al. 2017, arXiv 1612.00796; the sum of all tasks' penalties):
            A' = γA + vF,   c' = c + (vF / A')(θ* − c) where A' > 0, else θ*,
            offset' = γ offset + ½ Σ γA (vF / A') (θ* − c)²
        online (Schwarz et al. 2018, arXiv 1805.06370):
            A' = γA + vF,   c' = θ*,   offset' = 0

        v = w / T, T the labels of an example (`Fisher.labels_per_example`): log p of an example is
        a sum over its labels, a loss is a mean over labels, and so is what a state holds. One λ
        then serves classifiers and language models, and sequences of any length.

        A parameter that the state has and the Fisher lacks takes part with F = 0. As c is held in
        fp32 (fp64 for fp64 parameters), A (θ − c) is off by up to 6e-8 |c| / |θ − c| of itself.

        Args:
            fisher: F, a mean over the task's examples.
            parameters: θ*: the model, a mapping by name, or pairs of name and tensor, with every
                name of the state and of the Fisher. The new tensors are copies and lie where they
                lie, in fp32 (an anchor that is θ* in θ*'s own dtype). Of a model the fingerprint
                is checked against the state's and recorded.
            mode: "online" or "separate".
            gamma: γ, decay of what the state holds, from 0 to 1.
            weight: w ≥ 0 of this task.
            name: of the task; by default "task_1", "task_2", ….
            dtype: of the new importance, see `pack`; each tensor is packed as it is made.
            keep_fraction: share of the new importances that is kept, see `pack`.
            device: where the new tensors go, each as it is made; None: where the parameters are.

        Raises:
            ValueError: a value out of its range, a name missing in `parameters`, another shape, an
                anchor that would not be finite, or another base model than before.
        """
        settings = Settings(mode, gamma, weight, dtype, keep_fraction, device)
        return self.begin_consolidation(fisher, parameters, settings, name)()

    def begin_consolidation(
        self, fisher: Fisher, parameters: Parameters, settings: Settings, name: str | None = None
    ) -> Callable[[], EWCState]:
        """`consolidate` in two steps: all checks now, the new state when the result is called.

        The result holds neither this state nor the Fisher, only their tensors, each until its
        successor is there. Who drops both before the call, as the Trainer does, never has more than
        the largest tensor twice.
        """
        if name is not None and not isinstance(name, str):
            raise TypeError(
                f"name is a {type(name).__name__}, {name!r}; a task's name is a string."
            )
        held = self.importance, self.anchor, self.offsets
        work = Consolidation(*held, fisher, parameters, settings)
        name = f"task_{self.num_tasks + 1}" if name is None else name
        record = TaskRecord.now(name, fisher, settings.weight, settings.ewc_lambda)
        tasks, metadata = (*self.tasks, record), {**self.metadata, "unit": "label"}
        if isinstance(parameters, nn.Module):
            self._check_fingerprint(parameters)
            metadata["fingerprint"] = fingerprint.of_model(parameters, work.names)
        return lambda: EWCState(*work.finish(), tasks, metadata)

    def penalty(self, model: nn.Module) -> Tensor:
        """½ Σ_i A_i (θ_i − c_i)² + offset as a differentiable 0-dim tensor, without λ.

        Computed in fp32, for fp64 parameters in fp64, on the device of the model. Under FSDP2 every
        process has to call it, and each gets the whole sum.

        Raises:
            ValueError: the state does not fit the model (see `check`, of which the part on the
                base model and the head is done at the first call).
        """
        parameters = weights_named(self.importance, model)
        self._check_names(model, values_needed=True)
        fit.check_once(self, self._check_fingerprint, model)
        thetas = ((name, differentiable(parameters[name])) for name in self.importance)
        terms = [half_square(*self.packed(name), theta) for name, theta in thetas]
        return sum_of(terms, next(model.parameters(), torch.zeros(())).device) + self.offset

    def merge(self, model: nn.Module) -> nn.Module:
        """The weights of all tasks in one model: the average that the Fishers weigh.

        θ_i = c_i = Σ_k w_k F_k,i θ*_k,i / Σ_k w_k F_k,i where the sum is above 0, else as it is
        (Matena & Raffel 2022, arXiv 2111.09832, equation 4: Fisher merging, with λ_k = w_k). It is
        where the penalty of all tasks is least, and needs no task's weights but this state: tasks
        consolidated with mode="separate", each from where it was trained, are all in c. With
        γ below 1 task k counts γ^(K − k) times as much.

        mode="online" keeps no sum: c is the newest task's θ*, and that is what is loaded.

        Args:
            model: gets the weights, in place, in its own dtype; parameters that the state lacks or
                that no task needs (A_i = 0) stay.

        Returns:
            The model.

        Raises:
            ValueError: the state does not fit the model, is of the weights under its adapters, or
                the model is in shards of ZeRO-3.
        """
        self._check_names(model, values_needed=True)
        self._check_fingerprint(model)
        merging.merge_into(model, self.importance, self.anchor)
        return model

    def check(self, model: nn.Module) -> None:
        """Raise unless this state belongs to `model`; every mismatch is named at once.

        Compares names and shapes of parameters and, for a PEFT model, the kind of adapter and
        samples of the base weights under it, as they were at the last consolidation.

        Raises:
            ValueError: a parameter is missing or has another shape, or the base model is another.
        """
        self._check_names(model, values_needed=False)
        self._check_fingerprint(model)

    def pack(
        self, dtype: torch.dtype | str = torch.float32, keep_fraction: float = 1.0
    ) -> EWCState:
        """The same state in less memory.

        The importance is held in `dtype`; in half precision with one scale per parameter, in float8
        (E4M3, off by at most 6 %) with one for each 128, so that no positive importance becomes 0.
        The anchor keeps its precision. With `keep_fraction` below 1 only the largest ⌈share ·
        entries⌉ importances of the whole state are kept (those that are 0 never), with their
        anchors, as sparse tensors; all others are unprotected from then on. A parameter of which so
        much is kept that sparse would be larger is held dense.

        Raises:
            ValueError: another dtype than float32, bfloat16, float16 or float8, a share outside
                (0, 1], or DTensors with a share below 1.
        """
        importance, anchor = packing.packed_into(self.importance, self.anchor, dtype, keep_fraction)
        return replace(self, importance=importance, anchor=anchor)

    def grow_rows(self, model: nn.Module, names: Iterable[str]) -> EWCState:
        """The state with the new last rows of grown parameters admitted, unprotected.

        For a classifier or an embedding that got more rows since: there A = 0 and c = θ, and the
        earlier rows stay as they are.

        Args:
            model: the model that has the grown parameters.
            names: which ones to admit, of tied ones under any of their names; only these change.

        Raises:
            ValueError: a name is not in the state or the model, or more than its rows changed.
        """
        importance, anchor = growing.with_new_rows(self.importance, self.anchor, model, names)
        return replace(self, importance=importance, anchor=anchor)

    def with_head(self, model: nn.Module) -> EWCState:
        """The state for a model whose head was trained on since, far from its anchor.

        A head that has nothing to do with the anchor is refused as another one when training
        begins. This says that the head of `model` is the one that was consolidated.

        Raises:
            ValueError: the state does not fit the model, or its head is for other labels.
        """
        self.check(model)
        known = self.metadata.get("fingerprint") or {}
        head = fingerprint.of_model(model, self.importance.keys()).get("head")
        return replace(self, metadata={**self.metadata, "fingerprint": {**known, "head": head}})

    def rename_adapter(self, old: str, new: str) -> EWCState:
        """The state of a PEFT adapter that is called `new` now, where it was called `old`.

        Raises:
            ValueError: no parameter of the state is of the adapter `old`.
        """
        names = {name: renaming.of_adapter(name, old, new) for name in self.importance}
        if all(name == renamed for name, renamed in names.items()):
            raise ValueError(f"rename_adapter: the state has no parameter of an adapter {old!r}.")
        metadata = dict(self.metadata)
        if isinstance(metadata.get("fingerprint"), Mapping):
            metadata["fingerprint"] = renaming.of_fingerprint(metadata["fingerprint"], old, new)
        return replace(self._under(names), metadata=metadata)

    def without(self, modules: Sequence[str] | str) -> EWCState:
        """The state without the parameters in these modules, such as a head that is replaced.

        Args:
            modules: suffixes of the names of modules or parameters, or one regular expression.

        Raises:
            ValueError: an entry matches no parameter of the state.
        """
        dropped = names_in(modules, list(self.importance), "without", "the state")
        return self._under({name: name for name in self.importance if name not in dropped})

    def to(self, device: torch.device | str) -> EWCState:
        """The same state with its tensors on `device`."""
        return replace(self, importance=self.importance.to(device), anchor=self.anchor.to(device))

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        is_main_process: bool | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> None:
        """Write the state to a folder, as `ewc_state.json` and one safetensors file.

        At any moment, also if the process is killed, the folder holds the whole former state or
        the new one. Called by every process, it is written once.

        Args:
            folder: made if it is not there.
            is_main_process: whether this process writes; None: rank 0 does. The others help gather
                DTensors, and are not held up until the files are there.
            checkpoint: a folder or file of a model's weights (safetensors). An anchor that is there
                bit for bit is not written again: the state names it, by the path from `folder`, and
                is read only while that file is unchanged. Others are written, with a warning.

        Raises:
            ValueError: `folder` is empty or a file, or there are no weights in `checkpoint`.
            TypeError: `folder` is no path.
        """
        write = is_main() if is_main_process is None else is_main_process
        fields = self.importance, self.anchor, self.offsets, self.tasks, self.metadata
        storage.save(storage.Content(*fields), folder, write, checkpoint)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> EWCState:
        """Read a state from a folder (also a Trainer's checkpoint) or from the Hugging Face Hub.

        The tensors are on the CPU, mapped from the files where the platform can.

        Raises:
            ValueError: there is no state, a file (also one that it refers to) is damaged or
                missing, or its format is newer than this version reads; the message says which.
        """
        folder = hub.resolve(source, revision=revision, token=token, cache_dir=cache_dir)
        found = storage.load(folder)
        return cls(found.importance, found.anchor, found.offsets, found.tasks, found.metadata)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload EWC state",
        create_pr: bool = False,
    ) -> str | None:
        """Upload the state to a model repository of the Hugging Face Hub, made if it is not there.

        The model card gets the tag `ewc` and a section on the state; what else it says is kept.
        Called by every process, it is uploaded once, by rank 0.

        Returns:
            The address of the commit; None on the processes that upload nothing.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            if not is_main():
                return None
            return hub.push(
                Path(folder),
                self.card_section(),
                repo_id,
                private=private,
                token=token,
                revision=revision,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    def card_section(self, settings: Mapping[str, object] | None = None) -> str:
        """The section for a model card, in Markdown; settings, as {"λ": 1e3}, are further lines."""
        tasks = [asdict(task) for task in self.tasks]
        return card.section_of(self.importance.shapes, self.nbytes, tasks, settings or {})

    def _under(self, names: Mapping[str, str]) -> EWCState:
        """The state of these of its parameters, under the names that are given for theirs."""
        return EWCState(
            TensorMap({new: self.importance.packed(old) for old, new in names.items()}),
            TensorMap({new: self.anchor.packed(old) for old, new in names.items()}),
            {new: self.offsets[old] for old, new in names.items()},
            self.tasks,
            self.metadata,
        )

    def _check_names(self, model: nn.Module, values_needed: bool) -> None:
        known = self.metadata.get("fingerprint")
        fit.check_names(self.importance.shapes, known, model, values_needed)

    def _check_fingerprint(self, model: nn.Module) -> None:
        fit.check_fingerprint(self.metadata.get("fingerprint"), self.importance, model)
