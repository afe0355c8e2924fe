"""A model on its devices: weights placed on a mesh, and its forward pass as pure functions of them."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxserve.engine.kernels import PORTABLE, Kernels, serving
from jaxserve.engine.step import KV, Model, Weights
from jaxserve.loading.weights import Source, Tensors, check, parameters
from jaxserve.models.layers.linear import Product, Quantization, Used
from jaxserve.models.layers.param import Scope, partition_spec, take_sources
from jaxserve.models.registry import code_of, model_class
from jaxserve.pallas_kernels.paged_attention import (
    AttentionMeta,
    Implementation,
    Pool,
    Rotation,
    paged_attention,
)

POOL_SPEC = PartitionSpec(None, None, "tensor")
HEADS_SPEC = PartitionSpec(None, "tensor")


class LoadedModel:
    """The model that a checkpoint's config describes, and its weights on `mesh`."""

    def __init__(
        self,
        config: Mapping[str, Any],
        mesh: Mesh,
        dtype: Any,
        kernels: Kernels = PORTABLE,
        quantization: Quantization | None = None,
    ):
        """Builds the model abstractly; `load` or `fill` brings the weights, kept as the kernels read them."""
        cls: Any = model_class(config)
        self.code = f"{cls.__module__}.{cls.__qualname__} {code_of(cls)}"
        """What there is to know of its forward pass."""
        self.mesh = mesh
        self.dtype = jnp.dtype(dtype)
        self.config = cls.Config.from_config(config)
        self.kernels = serving(kernels, self.dtype, self.config.head_dim, self.config.alibi)
        self.shards = mesh.shape["tensor"]
        self._table: dict[str, Source] = {}

        def build() -> nnx.Module:
            module: nnx.Module = cls(self.config, Scope(self.dtype, self.shards))
            self._table = take_sources(module)
            for product in _products(module).values():
                product.multiply_with(kernels.matmul, quantization, rounded=kernels.rounded)
            return module

        self._module = nnx.eval_shape(build)
        self._products = _products(self._module)
        self._read_as = np.dtype(np.float32) if quantization else self.dtype
        state = nnx.state(self._module)
        flat = nnx.to_flat_state(state)
        self._leaves = {".".join(map(str, path)): param for path, param in flat}
        self._treedef = jax.tree.structure(state)
        self.weights: Weights = []

    @property
    def kv_heads(self) -> int:
        """KV heads in the pool, padding for the mesh included."""
        return len(self.config.heads(self.shards).kv)

    @property
    def bytes(self) -> int:
        """Size of the weights on one device."""
        return sum(
            math.prod(self._sharding(path).shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for path, leaf in self._leaves.items()
        )

    @property
    def abstract(self) -> list[jax.ShapeDtypeStruct]:
        """Shape, type and sharding of every weight, loaded or not."""
        return [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._sharding(path))
            for path, leaf in self._leaves.items()
        ]

    def check(self, checkpoint: Tensors) -> None:
        """Raise ModelError naming the first tensor that is wrong; only headers are read."""
        check(checkpoint, self._table)

    def load(self, checkpoint: Tensors) -> None:
        """Read the weights, few parameters at a time. Raises ModelError naming the tensor that is wrong.

        On a terminal a bar shows how much of them is there.
        """
        from tqdm import tqdm

        placed: dict[str, jax.Array] = {}
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in self._leaves.values())
        with tqdm(total=size, unit="B", unit_scale=True, desc="weights", delay=1.0, disable=None) as bar:
            for _, held in parameters(checkpoint, self._table, self._place, self._read_as):
                placed |= held
                bar.update(sum(x.nbytes for x in held.values()))
        self.weights = [placed[path] for path in self._leaves]

    def fill(self, seed: int) -> None:
        """Random weights, made on the devices: for measuring without a checkpoint."""

        def numbers(key: jax.Array, shape: tuple[int, ...], dtype: Any, size: float) -> jax.Array:
            if dtype.itemsize == 1:
                return jax.random.bits(key, shape, jnp.uint8).view(dtype)
            return (jax.random.normal(key, shape, jnp.float32) * size).astype(dtype)

        for i, (path, leaf) in enumerate(self._leaves.items()):
            size = 0.02 if len(leaf.shape) > 1 else 1.0
            if path.endswith(".scale"):
                size = 0.02 / 74  # of integers that are 74 from zero in the root mean square
            make = jax.jit(numbers, static_argnums=(1, 2), out_shardings=self._sharding(path))
            self.weights.append(make(jax.random.key(seed + i), leaf.shape, leaf.dtype, size))

    def functions(self) -> Model:
        """The forward pass as pure functions of the weights."""
        graph = nnx.graphdef(self._module)
        attend_with = partial(self._attend, self.kernels.attention)

        def module(weights: Weights, used: jax.Array) -> Any:
            merged = nnx.merge(graph, jax.tree.unflatten(self._treedef, weights))
            for part in _products(merged).values():
                part.used = Used(used)
            return merged

        def hidden(weights: Weights, ids: jax.Array, meta: AttentionMeta, kv: KV) -> tuple[jax.Array, KV]:
            attend = jax.tree_util.Partial(attend_with, meta)  # a pytree: the layers' jit takes it
            x, pools = module(weights, jnp.sum(meta.q_lens))(ids, meta.row_pos, attend, kv)
            return x, pools

        def logits(weights: Weights, x: jax.Array, used: jax.Array) -> jax.Array:
            y: jax.Array = module(weights, used).logits(x)
            return y

        return Model(hidden, logits)

    def _attend(
        self,
        implementation: Implementation,
        meta: AttentionMeta,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        rotation: Rotation | None,
        pool: Pool,
        *,
        alibi: jax.Array | None = None,
        **options: Any,
    ) -> tuple[jax.Array, Pool]:
        """Attention with each device on its own heads: a pool that is never gathered."""
        op: Callable[..., tuple[jax.Array, Pool]] = partial(
            paged_attention, dtype=self.dtype, implementation=implementation, **options
        )
        inputs = q, k, v, pool, meta, rotation
        if self.mesh.size == 1:
            return op(*inputs, alibi=alibi)
        specs = (HEADS_SPEC, HEADS_SPEC, HEADS_SPEC, POOL_SPEC, PartitionSpec(), PartitionSpec())
        sharded: Callable[..., tuple[jax.Array, Pool]] = jax.shard_map(
            lambda alibi, *inputs: op(*inputs, alibi=alibi),
            mesh=self.mesh,
            in_specs=(PartitionSpec("tensor"), *specs),
            out_specs=(HEADS_SPEC, POOL_SPEC),
            check_vma=False,
        )
        return sharded(alibi, *inputs)

    def _sharding(self, path: str) -> NamedSharding:
        return NamedSharding(self.mesh, partition_spec(self._leaves[path].get_metadata()["axes"]))

    def _place(self, path: str, value: np.ndarray) -> dict[str, jax.Array]:
        """The parameters that hold what a checkpoint has for one; a product knows which."""
        leaf, (layer, _, name) = self._leaves[path], path.rpartition(".")
        product = self._products.get(layer) if name == "weight" else None
        whole = leaf.shape if product is None else (*product.out_shape, *product.in_shape)
        short = [(0, want - have) for want, have in zip(whole, value.shape, strict=True)]
        if any(after for _, after in short):
            value = np.pad(value, short)
        if product is None:
            held = {path: value.astype(leaf.dtype, copy=False)}
        else:
            held = {f"{layer}.{part}": x for part, x in product.keep(value).items()}
        return {path: self._put(path, x) for path, x in held.items()}

    def _put(self, path: str, x: np.ndarray) -> jax.Array:
        # jax may keep what it is given: of a view of a file all of the file would stay
        whole: jax.Array = jax.device_put(x if x.flags.writeable else x.copy(), self._sharding(path))
        return whole


def _products(module: nnx.Module) -> dict[str, Product]:
    """By their paths."""
    parts = nnx.iter_modules(module)
    return {".".join(map(str, path)): part for path, part in parts if isinstance(part, Product)}
