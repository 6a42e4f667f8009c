"""A patched file behind onnxruntime, whose fix is exchanged, or switched off, while requests are served.

    a patch  ->  baked into the file's own base, in memory  ->  the weights that differ  ->  a new session of the same
    file with these weights  ->  proven by a probe  ->  exchanged

The file is read once: what is not as baking writes it is refused, and what was proven is what serves. Only external
data lies on disk; where it was exchanged since, a change is refused. A request that runs finishes on the session it
began with, and the old session goes when its last request has. onnxruntime checks neither shape nor type of a weight
that it is handed, and ignores it where its optimizer made another constant of the old one; so both are checked here,
and the new session has to answer a probe as a session does in whose graph the new weights stand.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.again import require_as_baked
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.metadata import PatchedSite, PatchRecord, read_record
from atpatch_onnx.errors import PatchMismatchError, ServingError
from atpatch_onnx.graph.names import FLAGGED, PREFIX, SCORE, SITE_KEY, flags_name, own_name
from atpatch_onnx.matching.batches import drawn_inputs
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.running.bits import close
from atpatch_onnx.running.opening import Libraries, load
from atpatch_onnx.running.providers import Providers
from atpatch_onnx.running.sessions import Array, FileSession, Session, SessionOptions
from atpatch_onnx.serving.counters import Counters, Stats
from atpatch_onnx.serving.held import HeldData
from atpatch_onnx.serving.servable import require_servable
from atpatch_onnx.serving.turns import Turns

TOLERANCE = 1e-5
"""Of an output in the proof, relative to its largest value: both sessions run the same graph."""

_CLEAR = 1e-3
"""How far the probe's middle token is above a threshold, relative to its margin: whatever is rounded, it is flagged."""

Weights = Mapping[str, Array]
"""Of the patch, by their names in the graph."""


class PatchedSession:
    """As `onnxruntime.InferenceSession`: `run`, `get_inputs` and `get_outputs` are its own. Thread-safe.

    Args:
        path: A patched model, baked with monitoring outputs.
        patch: A patch to begin with, instead of the one in the file.
        providers: Execution providers; the CPU's by default.
        options: Makes the options of a session; asked again for every new one.
        probe: Inputs `[samples, ...]` by name that a new session is proven with; drawn at random by default. Real ones
            are better where a model takes no others, such as tokens that must follow a grammar.
        custom_ops: Libraries that operators of the model come from, as in `load`.

    Raises:
        ModelFileError: The file cannot be read.
        UnbakeError: It is not patched, or not what baking writes.
        ServingError: It was baked without monitoring outputs.
        PatchMismatchError, ServingError: See `swap`.
        RunError: onnxruntime refuses it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        patch: Patch | None = None,
        *,
        providers: Providers = ("cpu",),
        options: Callable[[], SessionOptions] = SessionOptions,
        probe: Mapping[str, Array] | None = None,
        custom_ops: Libraries = (),
    ) -> None:
        self._providers, self._options = tuple(providers), options
        self._model = load(path, custom_ops=custom_ops)
        self._held = HeldData.of(self._model)
        self._record = read_record(self._model)
        require_servable(os.fspath(path), self._model, self._record)
        self._base = require_as_baked(self._model)
        self._probe = drawn_inputs(self._base, np.random.default_rng(0)) if probe is None else probe
        self._own: Weights = _weights(self._model)
        self._weights: Weights = self._own
        self._live_record, self._off = self._record, frozenset[str]()
        self._counters, self._changing = Counters(), Turns()
        self._live: FileSession | None = self._open(self._own)
        self._names = [output.name for output in self._serving.session.get_outputs()]
        if patch is not None:
            self.swap(patch)

    def run(
        self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any], run_options: Any = None
    ) -> list[Any]:
        """As `InferenceSession.run`, and counted; what onnxruntime raises is raised."""
        live = self._serving  # one reading: a request belongs to one session
        wanted = list(output_names or self._names)
        monitors = [name for name in self._record.monitors if name not in wanted and name != SCORE]
        started = time.perf_counter()
        results = live.session.run([*wanted, *monitors], dict(input_feed), run_options)
        seconds = time.perf_counter() - started
        named = dict(zip([*wanted, *monitors], results, strict=True))
        sites = {site.site: flags_name(site.site) for site in self._record.sites}
        self._counters.count(
            named[FLAGGED], seconds, {site: named[flags] for site, flags in sites.items() if flags in named}
        )
        return list(results[: len(wanted)])

    def close(self) -> None:
        """Let go of the model; requests that run finish, later ones are refused."""
        with self._changing:
            self._live = None

    def __enter__(self) -> "PatchedSession":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def _serving(self) -> FileSession:
        live = self._live
        if live is None:
            raise ServingError(
                "the session",
                expected="one that serves",
                found="one that was closed",
                advice="Start a new one.",
            )
        return live

    def get_inputs(self) -> list[Any]:
        """As in `InferenceSession`."""
        return list(self._serving.session.get_inputs())

    def get_outputs(self) -> list[Any]:
        """As in `InferenceSession`."""
        return list(self._serving.session.get_outputs())

    @property
    def patch(self) -> str:
        """Id of the patch that is live."""
        return self._live_record.patch

    @property
    def figures(self) -> Mapping[str, Any]:
        """What the fit of the live patch measured; `goal.clean_flag_rate` is what `drift` compares with."""
        return self._live_record.figures

    @property
    def sites(self) -> tuple[str, ...]:
        """The patched sites, in graph order."""
        return tuple(site.site for site in self._record.sites)

    @property
    def disabled(self) -> frozenset[str]:
        """Sites and edited hidden layers that are switched off."""
        return self._off

    def stats(self) -> Stats:
        """What was counted since the start, over all patches. Counts by site need a patch baked with `site_flags`."""
        return self._counters.stats()

    def swap(self, patch: Patch) -> None:
        """Replace the fix by another one of the same sites and sizes; those that are switched off stay so.

        Raises:
            PatchMismatchError: The patch was fitted on another model, or differs from the file's in more than numbers.
            ServingError: The new session does not do what the patch says; the old one stays.
        """
        with self._changing:
            self._held.require_unchanged()
            site_flags = len(self._record.monitors) > 2
            baked = bake(self._base, patch, conditional=self._record.conditional, site_flags=site_flags)
            record, weights = read_record(baked), _weights(baked)
            self._require_same_form(patch, baked, record, weights)
            self._exchange(weights, record, self._off)

    def disable(self, name: str) -> None:
        """Let a site neither detect nor redistribute, or a hidden layer be as in the base, unedited.

        Flags of other sites are carried past a site that is switched off.

        Raises:
            ServingError: There is no such site or layer, or the new session does not do what it should.
        """
        with self._changing:
            self._exchange(self._weights, self._live_record, self._off | {self._known(name)})

    def enable(self, name: str) -> None:
        """Switch a site or layer on again; errors as in `disable`."""
        with self._changing:
            self._exchange(self._weights, self._live_record, self._off - {self._known(name)})

    def _known(self, name: str) -> str:
        names = [*self.sites, *(layer.layer for layer in self._record.layers)]
        if name not in names:
            raise ServingError(
                "what to switch", expected=f"one of {', '.join(names)}", found=repr(name), advice="Choose one of these."
            )
        return name

    def _require_same_form(self, patch: Patch, baked: ir.Model, record: PatchRecord, weights: Weights) -> None:
        """Refuse what could not be said by other numbers in the same graph."""

        def refuse(expected: str, found: str) -> PatchMismatchError:
            return PatchMismatchError(
                f"patch {patch.id}",
                expected=expected,
                found=found,
                advice="Bake it into the base, and start a session of that file.",
            )

        forms = [[replace(site, threshold=None) for site in one.sites] for one in (self._record, record)]
        if forms[0] != forms[1] or _nodes(self._model) != _nodes(baked):
            raise refuse(
                f"the file's own sites and layers, each doing the same ({_roles(self._record)})",
                f"others ({_roles(record)})",
            )
        for name in self._own:
            if (self._own[name].shape, self._own[name].dtype) != (weights[name].shape, weights[name].dtype):
                raise refuse(
                    f"{name} of shape {list(self._own[name].shape)}, as in the file",
                    f"one of shape {list(weights[name].shape)}",
                )

    def _exchange(self, weights: Weights, record: PatchRecord, off: frozenset[str]) -> None:
        """Open a session with these weights, prove it, and let it serve from now on."""
        _ = self._serving
        wanted = {**weights, **dict(self._silenced(off))}
        alarmed = self._alarmed(wanted)
        if alarmed is not None:  # in which redistribution has something to do
            self._require_effect(self._open(alarmed), alarmed)
        live = self._open(wanted)
        self._require_effect(live, wanted)
        self._live, self._weights, self._live_record, self._off = live, weights, record, off

    def _open(self, weights: Weights) -> FileSession:
        others = {name: array for name, array in weights.items() if not np.array_equal(array, self._own[name])}
        session = FileSession(self._model, others, providers=self._providers, options=self._options())
        self._held.require_unchanged()
        return session

    def _silenced(self, off: frozenset[str]) -> Iterator[tuple[str, Array]]:
        """What is switched off: a threshold that nothing exceeds, a level that no margin does, no edited unit."""
        never = np.array([np.inf], np.float32)
        for site in self._record.sites:
            if site.site in off:
                yield from ((name, never) for name in site.weights)
        for layer in self._record.layers:
            if layer.layer in off:
                name = own_name(layer.scope, "edited")
                yield name, np.zeros_like(self._own[name])

    def _alarmed(self, weights: Weights) -> Weights | None:
        """The weights with thresholds so low that half of the probe's tokens, or its only one, are flagged.

        None where no site detects.
        """
        thresholds = self._record.thresholds
        awake = {name: margin for name, margin in thresholds.items() if np.isfinite(weights[name]).all()}
        if not awake:
            return None
        margins = list(awake.values())
        found = Session(expose(self._with(weights), margins), providers=self._providers).run(self._probe, margins)
        middle = {name: np.median(found[margin]) for name, margin in awake.items()}
        lower = {name: weights[name] + margin - _CLEAR * max(1.0, abs(margin)) for name, margin in middle.items()}
        return {**weights, **{name: np.asarray(array, np.float32) for name, array in lower.items()}}

    def _with(self, weights: Weights) -> ir.Model:
        """The model with other weights of the patch in its graph."""
        model = graphs.copy(self._model)
        for name, array in weights.items():
            model.graph.initializers[name].const_value = ir.tensor(array, name=name)
        return model

    def _require_effect(self, session: FileSession, weights: Weights) -> None:
        """The probe's outputs must be those of a session in whose graph the weights stand."""
        expected = Session(self._with(weights), providers=self._providers).run(self._probe)
        found = session.session.run(list(expected), dict(self._probe))
        for name, array in zip(expected, found, strict=True):
            if not close(expected[name], array, TOLERANCE):
                raise ServingError(
                    "the new session",
                    expected=f"the output {name} of a probe as the new weights of the patch make it",
                    found="another one: onnxruntime did not take all of them",
                    advice="The old session goes on. Bake the patch into the base, and start a session of that file.",
                )


def _weights(model: ir.Model) -> dict[str, Array]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if name.startswith(PREFIX) and value.const_value is not None
    }


def _nodes(model: ir.Model) -> list[tuple[str, str | None]]:
    """Our nodes, by operator and name."""
    return [(node.op_type, node.name) for node in model.graph.all_nodes() if SITE_KEY in node.metadata_props]


def _roles(record: PatchRecord) -> str:
    def role(site: PatchedSite) -> str:
        return " and ".join(["detects"] * (site.own is not None) + ["redistributes"] * site.redistributes)

    sites = [f"{site.site} {role(site)}" for site in record.sites]
    return "; ".join([*sites, *(f"{layer.layer} is edited" for layer in record.layers)])
