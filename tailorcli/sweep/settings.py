"""Ways to patch one pair: what a sweep tries, each with its label, its family and its command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product

from tailorcli.options import DistillOptions, PatchMethod, PatchOptions, Solver
from tailorcli.runs.again import number_of, patch_command, shell_text

WEIGHTS = (0.3, 0.5, 0.7)  # of an interpolation, unless others are asked for
SCALES = (0.5, 1.0, 2.0)  # of dg-hard's threshold


@dataclass(frozen=True)
class Setting:
    """One way to patch: the options, whether the retained statistics are used, and how it is distilled, if it is.

    What is distilled uses the samples of both statistics, whatever its method.
    """

    options: PatchOptions
    retained: bool = False
    distill: DistillOptions | None = None

    @property
    def resolved(self) -> PatchOptions:
        """The options with a value for everything."""
        distilled = self.distill is not None
        return self.options.resolved(self.retained or distilled, distilled)

    @property
    def family(self) -> str:
        """What it is compared as; the settings of a family make one frontier."""
        o = self.resolved
        distilled = ", distilled" if self.distill is not None else ""
        if o.method != "tailor":
            return f"{o.method}{distilled}"
        retained = self.retained or (self.distill is not None and o.needs_hessians)
        return f"{o.solver}{', propagated' if o.propagate else ', retained' if retained else ''}{distilled}"

    @property
    def label(self) -> str:
        """The family with what distinguishes its settings, numbers in full."""
        o = self.resolved
        if o.is_dense:
            dense = {
                "interpolate": [f"{self.family} {number_of(o.effective_weight)}"],
                "changed": [self.family],
                "lines": [self.family, f"alpha {number_of(o.alpha)}", f"beta {o.effective_beta:g}"],
            }
            parts = dense.get(o.method, [self.family, f"threshold scale {number_of(o.threshold_scale)}"])
            return ", ".join([*parts, *self._distilled])
        parts = [self.family, f"density {number_of(o.density)}"]
        if self.retained:
            parts.append(f"retain weight {number_of(o.retain_weight)}")
        if o.method == "tailor" and o.omega != PatchOptions().omega:
            parts.append(f"omega {number_of(o.omega)}")
        distilled = self.distill is not None
        usual = PatchOptions().resolved(self.retained or distilled, distilled)
        if o.method == "tailor" and o.effective_score != usual.effective_score:
            parts.append(f"score {o.effective_score}")
        if o.method == "tailor" and o.damping != usual.damping:
            parts.append(f"damping {number_of(o.effective_damping)}")
        if o.effective_weight != 1.0:
            parts.append(f"weight {number_of(o.effective_weight)}")
        return ", ".join([*parts, *self._distilled])

    def command(self, inputs: Mapping[str, str]) -> str:
        """The ``tailorcli patch`` that makes this setting's model; ``inputs`` are paths by their roles."""
        options = self.resolved
        used = {
            "base": True,
            "tuned": True,
            "stats": options.needs_hessians or self.distill is not None,
            "retain": self.retained or self.distill is not None,
            "data": options.method == "graft",
        }
        given = {role: path for role, path in inputs.items() if used[role]}
        trained = None if self.distill is None else asdict(self.distill)
        return shell_text(patch_command(options.to_dict(), given, distilled=trained))

    @property
    def _distilled(self) -> list[str]:
        """How it is distilled, where that is not as by default."""
        if self.distill is None:
            return []
        chosen, default = asdict(self.distill), asdict(DistillOptions())
        changed = {name: value for name, value in chosen.items() if value != default[name]}
        shown = {
            name: number_of(value) if isinstance(value, (int, float)) else value for name, value in changed.items()
        }
        return [f"distill {name.replace('_', ' ')} {value}" for name, value in shown.items()]


def settings_of(
    options: PatchOptions,
    *,
    densities: Sequence[float] = (0.1,),
    omegas: Sequence[float] = (0.5,),
    solvers: Sequence[Solver | str] = ("joint",),
    retain_weights: Sequence[float] = (),
    dampings: Sequence[float | None] = (None,),
    methods: Sequence[PatchMethod | str] = (),
    weights: Sequence[float] = (),
    distill: DistillOptions | None = None,
) -> list[Setting]:
    """Every combination of the values for the method tailor, and of those that ``methods`` have for each of them.

    ``retain_weights`` are for the retained statistics; zero is without them, and so is what uses no statistics at all.
    ``weights`` are the interpolation's, and the alphas of ``lines``, which goes on from each to tuned itself;
    ``dg-hard`` has its threshold halved and doubled. With ``distill`` each setting with retained statistics comes once
    more, distilled.
    """
    found: list[Setting] = []
    for density, omega, solver, retain_weight, damping in product(
        densities, omegas, solvers, retain_weights or (0.0,), dampings
    ):
        changed = replace(
            options,
            density=density,
            omega=omega,
            solver=solver,
            damping=damping,
            propagate=options.propagate if solver == "joint" and retain_weight > 0 else None,
        )
        retained = retain_weight > 0 and changed.needs_hessians
        if changed.needs_hessians:
            changed = replace(changed, retain_weight=retain_weight)
        found.append(Setting(changed, retained=retained))
        if distill is not None and retain_weight > 0:
            found.append(Setting(changed, retained=retained, distill=distill))
    options = replace(options, score=None, propagate=None)  # which are of the method tailor
    for method in methods:
        if method == "interpolate":
            found += [Setting(replace(options, method=method, weight=weight)) for weight in weights or WEIGHTS]
        elif method == "lines":
            found += [Setting(replace(options, method=method, alpha=alpha)) for alpha in weights or WEIGHTS]
        elif method == "changed":
            found.append(Setting(replace(options, method=method)))
        elif method == "dg-hard":
            found += [Setting(replace(options, method=method, threshold_scale=scale)) for scale in SCALES]
        elif method != "tailor":
            found += [Setting(replace(options, method=method, density=density)) for density in densities]
    return list(dict.fromkeys(found))
