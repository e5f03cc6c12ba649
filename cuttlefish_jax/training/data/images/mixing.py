"""Mixup, cutmix and random erasing: pure, vectorised, and part of the compiled step."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

ERASING_TRIES = 10


def mix(
    key: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    *,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    switch_prob: float = 0.5,
) -> tuple[jax.Array, jax.Array]:
    """Mixes each example of a batch with its mirror image in the batch's order, the first with the last.

    Mixup is a weighted sum of the two images; cutmix puts a box of the one into the other. One of them is
    drawn for a whole batch, with one weight, as in timm's mode "batch". Inside ``jax.pmap`` the batch is a
    device's, so results depend on how a global batch is spread; a ``key`` of its own for each device draws a
    weight of its own for each.

    Args:
      key: one for the batch.
      images: ``f32[b, h, w, c]``, normalised.
      targets: ``f32[b, classes]``, probabilities.
      mixup_alpha: the weight of mixup is of the distribution Beta(alpha, alpha); 0 is no mixup.
      cutmix_alpha: 1 - the area of cutmix's box likewise; 0 is no cutmix.
      switch_prob: probability of cutmix, if there are both.

    Returns:
      Images and targets of the same shapes and dtypes.

    Raises:
      ValueError: if an alpha is negative, or the probability out of range.

    References:
      Zhang et al., mixup (ICLR 2018); Yun et al., CutMix (ICCV 2019).

    Example:
      >>> images, targets = jnp.zeros((2, 4, 4, 3)), jnp.eye(2)
      >>> _, soft = mix(jax.random.key(0), images, targets, cutmix_alpha=0.0)
      >>> bool((soft[0] == soft[1, ::-1]).all()), round(float(soft[0].sum()), 6)
      (True, 1.0)
    """
    if mixup_alpha < 0 or cutmix_alpha < 0:
        raise ValueError(
            f"mixup {mixup_alpha:g} and cutmix {cutmix_alpha:g} must be at least 0; 0 is without"
        )
    if not 0 <= switch_prob <= 1:
        raise ValueError(f"switch_prob {switch_prob:g}: expected 0 to 1")
    if not mixup_alpha and not cutmix_alpha:
        return images, targets
    switch_key, weight_key, place_key = jax.random.split(key, 3)
    _, height, width, _ = images.shape
    if mixup_alpha and cutmix_alpha:
        is_cutmix = jax.random.bernoulli(switch_key, switch_prob)
    else:
        is_cutmix = jnp.asarray(bool(cutmix_alpha))
    alpha = jnp.where(is_cutmix, cutmix_alpha, mixup_alpha)
    weight = jax.random.beta(weight_key, alpha, alpha)
    centre = jax.random.randint(place_key, (2,), 0, jnp.array([height, width]))
    around_box, share = cutmix_weights(weight, centre, height, width)
    weights = jnp.where(is_cutmix, around_box, weight)
    return mix_with(weights, jnp.where(is_cutmix, share, weight), images, targets)


def mix_with(
    weights: jax.Array, share: jax.Array, images: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mixes a batch with its mirror image, pixel by pixel.

    Args:
      weights: ``f32[h, w]``, of an example's own pixels; its mirror image gets the rest.
      share: ``f32[]``, their mean: the weight of an example's own target.
      images: ``f32[b, h, w, c]``.
      targets: ``f32[b, classes]``.

    Returns:
      Images and targets of the same shapes and dtypes.
    """
    weights = weights[:, :, None].astype(images.dtype)
    mixed = weights * images + (1 - weights) * images[::-1]
    return mixed, (share * targets + (1 - share) * targets[::-1]).astype(targets.dtype)


def cutmix_weights(
    weight: jax.Array, centre: jax.Array, height: int, width: int
) -> tuple[jax.Array, jax.Array]:
    """The weights of cutmix: 0 in a box, 1 around it.

    Args:
      weight: ``f32[]``, 1 - the area of the box as a share of the image's; what sticks out is cut off.
      centre: ``int32[2]``, the box's row and column.
      height: of the images.
      width: of the images.

    Returns:
      ``f32[height, width]``, and their mean, which is larger than ``weight`` if the box is cut off.
    """

    def inside(length: int, middle: jax.Array) -> jax.Array:
        side = jnp.floor(length * jnp.sqrt(1 - weight)).astype(jnp.int32)
        position = jnp.arange(length)
        return (position >= middle - side // 2) & (position < middle + (side + 1) // 2)

    rows, columns = inside(height, centre[0]), inside(width, centre[1])
    # Not the mean of the weights: so many float32 numbers do not add up exactly.
    share = 1 - rows.sum() * columns.sum() / (height * width)
    return 1.0 - (rows[:, None] & columns).astype(jnp.float32), share


def random_erasing(
    key: jax.Array,
    images: jax.Array,
    index: jax.Array,
    *,
    probability: float,
    area: tuple[float, float] = (0.02, 1 / 3),
    min_aspect: float = 0.3,
) -> jax.Array:
    """Replaces a box of some of the images by standard normal noise, pixel by pixel.

    A box that does not fit is drawn again; an image for which ten do not is left as it is. Distributed as
    timm's ``RandomErasing`` of mode "pixel".

    Args:
      key: of the step, for this alone.
      images: ``f32[b, h, w, c]``, normalised.
      index: ``int32[b]``, the examples' numbers; each draws from ``key`` and its number.
      probability: with which an image has a box.
      area: least and greatest area of the box, as a share of the image's.
      min_aspect: least height / width, and its inverse the greatest; the logarithm is uniform.

    Returns:
      Images of the same shape and dtype.

    References:
      Zhong et al., Random Erasing Data Augmentation (AAAI 2020), section 3.2.
    """
    _, height, width, channels = images.shape

    def erase(image: jax.Array, index: jax.Array) -> jax.Array:
        which, area_key, aspect_key, place_key, noise_key = jax.random.split(
            jax.random.fold_in(key, index), 5
        )
        areas = jax.random.uniform(area_key, (ERASING_TRIES,), minval=area[0], maxval=area[1])
        log_aspect = jax.random.uniform(aspect_key, (ERASING_TRIES,), minval=-1.0, maxval=1.0)
        aspects = jnp.exp(log_aspect * math.log(min_aspect))
        sides = jnp.stack([jnp.sqrt(areas * aspects), jnp.sqrt(areas / aspects)], axis=1)
        sides = jnp.round(sides * math.sqrt(height * width)).astype(jnp.int32)
        limits = jnp.array([height, width])
        fits = (sides < limits).all(axis=1)
        side = sides[fits.argmax()]
        top, left = jax.random.randint(place_key, (2,), 0, limits - side + 1)
        rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
        box = (rows >= top) & (rows < top + side[0]) & (columns >= left) & (columns < left + side[1])
        box &= fits.any() & jax.random.bernoulli(which, probability)
        noise = jax.random.normal(noise_key, (height, width, channels), images.dtype)
        return jnp.where(box[:, :, None], noise, image)

    return jax.vmap(erase)(images, index)
