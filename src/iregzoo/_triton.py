"""The two Triton kernels of ``iregzoo.kernels``, apart because they cannot be defined where Triton is missing.

Each program computes a block of voxels of one volume. Sums run in float32, whatever the volumes are kept in; volumes
may have any strides. Places in memory are counted in 64 bits, for a few channels of a large volume have 2³¹ numbers; a
stride comes in as many bits as it needs, so one factor of every product is widened here. Sizes are not specialised, or
each level of a pyramid would compile a kernel of its own.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.0e38)  # below every logit but −∞, from which nothing could be subtracted


@triton.jit
def within(place, size):
    """A place cut to no more than two voxels outside its axis, where all is zero; NaN stays NaN."""
    place = tl.where(place < -2.0, -2.0, place)
    return tl.where(place > size + 1.0, size + 1.0, place)


@triton.jit(do_not_specialize=["channels", "depth", "height", "width", "outer", "middle", "inner"])
def sample(
    image,
    places,
    out,
    channels,
    depth,
    height,
    width,
    outer,
    middle,
    inner,
    image_batch,
    image_channel,
    image_0,
    image_1,
    image_2,
    places_batch,
    places_axis,
    places_0,
    places_1,
    places_2,
    out_batch,
    out_channel,
    out_0,
    out_1,
    out_2,
    relative: tl.constexpr,
    border: tl.constexpr,
    block: tl.constexpr,
    block_channels: tl.constexpr,
):
    """Linear sampling of (B, channels, depth, height, width) at places (B, 3, outer, middle, inner), in voxels."""
    batch = tl.program_id(1).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    here = index < tl.cast(outer, tl.int64) * middle * inner
    x, y, z = index // (middle * inner), index // inner % middle, index % inner
    first = places + batch * places_batch + x * places_0 + y * places_1 + z * places_2
    px = tl.load(first, mask=here, other=0.0)
    py = tl.load(first + places_axis, mask=here, other=0.0)
    pz = tl.load(first + places_axis + places_axis, mask=here, other=0.0)
    if relative:
        px, py, pz = px + x.to(tl.float32), py + y.to(tl.float32), pz + z.to(tl.float32)
    px, py, pz = within(px, depth), within(py, height), within(pz, width)
    if border:  # written so that NaN stays NaN
        px = tl.where(px < 0.0, 0.0, tl.where(px > depth - 1.0, depth - 1.0, px))
        py = tl.where(py < 0.0, 0.0, tl.where(py > height - 1.0, height - 1.0, py))
        pz = tl.where(pz < 0.0, 0.0, tl.where(pz > width - 1.0, width - 1.0, pz))
    lower_x, lower_y, lower_z = tl.floor(px), tl.floor(py), tl.floor(pz)
    beyond_x, beyond_y, beyond_z = px - lower_x, py - lower_y, pz - lower_z
    ix, iy, iz = lower_x.to(tl.int64), lower_y.to(tl.int64), lower_z.to(tl.int64)
    for start in range(0, channels, block_channels):
        channel = start + tl.arange(0, block_channels).to(tl.int64)
        wanted = here[:, None] & (channel < channels)[None, :]
        total = tl.zeros((block, block_channels), dtype=tl.float32)
        for corner in tl.static_range(8):
            cx, cy, cz = ix + corner // 4, iy + corner // 2 % 2, iz + corner % 2
            share_x = beyond_x if corner // 4 else 1.0 - beyond_x
            share_y = beyond_y if corner // 2 % 2 else 1.0 - beyond_y
            share_z = beyond_z if corner % 2 else 1.0 - beyond_z
            inside = (cx >= 0) & (cx < depth) & (cy >= 0) & (cy < height) & (cz >= 0) & (cz < width)
            voxel = image + batch * image_batch + cx * image_0 + cy * image_1 + cz * image_2
            near = tl.load(
                voxel[:, None] + (channel * image_channel)[None, :], mask=wanted & inside[:, None], other=0.0
            )
            total += (share_x * share_y * share_z)[:, None] * near.to(tl.float32)
        target = out + batch * out_batch + x * out_0 + y * out_1 + z * out_2
        tl.store(target[:, None] + (channel * out_channel)[None, :], total.to(out.dtype.element_ty), mask=wanted)


@triton.jit(do_not_specialize=["heads", "channels", "value_channels", "depth", "height", "width"])
def attend(
    query,
    key,
    value,
    bias,
    out,
    heads,
    channels,
    value_channels,
    depth,
    height,
    width,
    query_batch,
    query_head,
    query_channel,
    query_0,
    query_1,
    query_2,
    key_batch,
    key_head,
    key_channel,
    key_0,
    key_1,
    key_2,
    value_batch,
    value_head,
    value_channel,
    value_0,
    value_1,
    value_2,
    out_batch,
    out_head,
    out_channel,
    out_0,
    out_1,
    out_2,
    scale,
    window_0: tl.constexpr,
    window_1: tl.constexpr,
    window_2: tl.constexpr,
    offsets: tl.constexpr,
    block: tl.constexpr,
    block_channels: tl.constexpr,
    block_values: tl.constexpr,
):
    """Attention of each voxel of (B, heads, channels, depth, height, width) to the window around it.

    Where ``offsets``, the window is centred, what is outside has a key of zeros, there is a bias, and the values are
    the neighbours' offsets; otherwise the window is shifted inside.
    """
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    here = index < tl.cast(depth, tl.int64) * height * width
    x, y, z = index // (height * width), index // width % height, index % width
    first_x, first_y, first_z = x - window_0 // 2, y - window_1 // 2, z - window_2 // 2
    if not offsets:
        first_x = tl.minimum(tl.maximum(first_x, 0), depth - window_0)
        first_y = tl.minimum(tl.maximum(first_y, 0), height - window_1)
        first_z = tl.minimum(tl.maximum(first_z, 0), width - window_2)
    channel = tl.arange(0, block_channels).to(tl.int64)
    known = here[:, None] & (channel < channels)[None, :]
    place = query + batch * query_batch + head * query_head + x * query_0 + y * query_1 + z * query_2
    asked = tl.load(place[:, None] + (channel * query_channel)[None, :], mask=known, other=0.0).to(tl.float32) * scale
    column = tl.arange(0, block_values).to(tl.int64)
    kept = here[:, None] & (column < value_channels)[None, :]
    highest = tl.full((block,), LOWEST, dtype=tl.float32)
    weight_sum = tl.zeros((block,), dtype=tl.float32)
    total = tl.zeros((block, block_values), dtype=tl.float32)
    for place_0 in range(window_0):
        for place_1 in range(window_1):
            for place_2 in range(window_2):
                kx, ky, kz = first_x + place_0, first_y + place_1, first_z + place_2
                there = known
                if offsets:
                    inside = (kx >= 0) & (kx < depth) & (ky >= 0) & (ky < height) & (kz >= 0) & (kz < width)
                    there = known & inside[:, None]
                # Names of their own: a name that a loop keeps has one type, and these need not be of the query's.
                keys = key + batch * key_batch + head * key_head + kx * key_0 + ky * key_1 + kz * key_2
                near = tl.load(keys[:, None] + (channel * key_channel)[None, :], mask=there, other=0.0)
                logit = tl.sum(asked * near.to(tl.float32), 1)
                if offsets:
                    number = (place_0 * window_1 + place_1) * window_2 + place_2
                    logit += tl.load(bias + head * (window_0 * window_1 * window_2) + number).to(tl.float32)
                    moved_0, moved_1, moved_2 = (
                        place_0 - window_0 // 2,
                        place_1 - window_1 // 2,
                        place_2 - window_2 // 2,
                    )
                    row = tl.where(column == 0, moved_0, tl.where(column == 1, moved_1, moved_2)).to(tl.float32)
                    found = tl.zeros((block, block_values), dtype=tl.float32) + row[None, :]
                else:
                    values = value + batch * value_batch + head * value_head
                    values += kx * value_0 + ky * value_1 + kz * value_2
                    found = tl.load(values[:, None] + (column * value_channel)[None, :], mask=kept, other=0.0)
                    found = found.to(tl.float32)
                # The softmax as it comes: all so far is scaled down whenever a logit is the highest yet.
                higher = tl.maximum(highest, logit)
                before, weight = tl.exp(highest - higher), tl.exp(logit - higher)
                weight_sum = weight_sum * before + weight
                total = total * before[:, None] + weight[:, None] * found
                highest = higher
    place = out + batch * out_batch + head * out_head + x * out_0 + y * out_1 + z * out_2
    result = (total / weight_sum[:, None]).to(out.dtype.element_ty)
    tl.store(place[:, None] + (column * out_channel)[None, :], result, mask=kept)
