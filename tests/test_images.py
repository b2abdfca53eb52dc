"""data/images.py: generated classes, augmentation, the binary version of CIFAR in small files."""

import numpy as np
import pytest
import torch

from data import images

RNG = np.random.default_rng(0)


def records(fine, coarse=7, label_bytes=2):
    """Bytes in the binary version, and their pixels [N, 3072]."""
    pixels = RNG.integers(0, 256, (len(fine), images.PIXELS), dtype=np.uint8)
    labels = [[coarse] * (label_bytes - 1) + [label] for label in fine]
    return np.concatenate([np.array(labels, dtype=np.uint8), pixels], axis=1).tobytes(), pixels


def write_cifar100(folder, train=(0, 1, 2) * 4, test=(2, 0)):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.bin").write_bytes(records(train)[0])
    (folder / "test.bin").write_bytes(records(test)[0])
    return folder


def test_records_are_fine_label_and_planes(tmp_path):
    content, pixels = records([5, 99, 0])
    (tmp_path / "train.bin").write_bytes(content)
    x, y = images.read_records(tmp_path / "train.bin", label_bytes=2)
    assert y.tolist() == [5, 99, 0]  # byte 1; byte 0 is the coarse label
    assert x.shape == (3, 3, 32, 32) and x.dtype == torch.uint8
    assert x[1, 2, 3, 4] == pixels[1, 2 * 1024 + 3 * 32 + 4]  # blue, row 3, column 4


def test_folder_of_cifar100_and_of_cifar10(tmp_path):
    data = images.read_folder(write_cifar100(tmp_path / "mine"))
    assert data.name == "mine" and data.num_classes == 3
    assert [len(y) for y in (data.train_y, data.val_y, data.test_y)] == [12, 0, 2]
    mean = (data.prepare(data.train_x) * data.scale + data.offset).mean()
    torch.testing.assert_close(mean, data.train_x.float().mean())
    assert data.scale.flatten()[0] == pytest.approx(255 * 0.2675)

    ten = tmp_path / "ten"
    ten.mkdir()
    for i, name in enumerate([f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]):
        fine = [i, i + 5 if i < 5 else 9]
        (ten / f"{name}.bin").write_bytes(records(fine, label_bytes=1)[0])
    data = images.read_folder(ten)
    assert data.train_y.tolist() == [0, 5, 1, 6, 2, 7, 3, 8, 4, 9]
    assert data.test_y.tolist() == [5, 9]


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="label 8; training knows 3"):
        images.read_folder(write_cifar100(tmp_path, test=(0, 8)))
    content = records([1, 2])[0][:-1]
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"train.bin: {len(content):,} bytes.*truncated"):
        images.read_folder(tmp_path)


def test_held_out_images_are_the_last_of_each_class_and_never_trained_on(tmp_path):
    write_cifar100(tmp_path, train=(0, 1, 1, 0, 1, 0, 0, 1), test=(1, 0))
    everything = images.read_folder(tmp_path)
    data = images.read_folder(tmp_path, train_per_class=0, val_per_class=1)
    assert torch.equal(data.train_x, everything.train_x[[0, 1, 2, 3, 4, 5]])
    assert torch.equal(data.val_x, everything.train_x[[6, 7]]) and data.val_y.tolist() == [0, 1]
    data = images.read_folder(tmp_path, train_per_class=1, val_per_class=2)
    assert torch.equal(data.train_x, everything.train_x[[0, 1]])
    assert torch.equal(data.val_x, everything.train_x[[4, 5, 6, 7]])
    with pytest.raises(ValueError, match="smallest class has 4"):
        images.read_folder(tmp_path, 3, 2)


def test_augment_crops_the_padded_image_and_mirrors():
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    still = images.augment(x, torch.full((2, 2), 4), torch.tensor([False, True]))
    assert torch.equal(still[0], x[0]) and torch.equal(still[1], x[1].flip(-1))
    assert still.dtype == torch.uint8
    moved = images.augment(x, torch.tensor([[5, 4], [4, 2]]), torch.tensor([False, False]))
    assert torch.equal(moved[0, :, :3], x[0, :, 1:])  # a row up, zeros below
    assert not moved[0, :, 3].any()
    assert torch.equal(moved[1, :, :, 2:], x[1, :, :, :2]) and not moved[1, :, :, :2].any()
    assert not images.augment(x, torch.tensor([[0, 0]] * 2), torch.tensor([True] * 2)).any()


def test_generated_classes_repeat_by_seed_and_share_their_superclass():
    one, again, other = (images.fine_grained(seed, 30, 4, 10) for seed in (1, 1, 2))
    assert one.digest == again.digest != other.digest
    assert [len(y) for y in (one.train_y, one.val_y, one.test_y)] == [1500, 200, 500]
    assert one.num_classes == 50 and one.train_x.shape[1:] == (3, 16, 16)
    assert torch.bincount(one.test_y).tolist() == [10] * 50
    assert not torch.equal(one.train_x[:50], one.test_x[:50])
    # Means over images blur the shifts away, but keep what a class is.
    means = torch.stack([one.train_x[one.train_y == k].mean(0).flatten() for k in range(50)])
    similar = torch.corrcoef(means)
    superclass = torch.arange(50) // 5
    related = superclass[:, None] == superclass
    itself = torch.eye(50, dtype=torch.bool)
    assert similar[related & ~itself].mean() > similar[~related].mean() + 0.4
    # A linear guess is above the chance of 0.02, and far from easy.
    guess = (one.test_x.flatten(1) @ torch.nn.functional.normalize(means).T).argmax(1)
    fine = (guess == one.test_y).float().mean()
    coarse = (guess // 5 == one.test_y // 5).float().mean()
    assert 0.1 < fine < 0.9 and coarse > fine + 0.05


def test_batches_are_a_shuffled_partition_of_the_training_images_drawn_from_the_seed():
    data = images.fine_grained(0, 2, 1, 1)
    batches = images.batch_maker(data, 30, 0, False)  # 3 steps an epoch, 10 images left over
    orders = [torch.cat([batches(3 * epoch + i)[2] for i in range(3)]) for epoch in range(2)]
    assert all(len(set(order.tolist())) == 90 and order.max() < 100 for order in orders)
    assert not torch.equal(*orders)
    x, y, index = batches(4)
    again = images.batch_maker(data, 30, 0, False)(4)
    assert torch.equal(x, data.train_x[index]) and torch.equal(y, data.train_y[index])
    assert torch.equal(x, again[0])
    assert not torch.equal(index, images.batch_maker(data, 30, 1, False)(4)[2])
    augmented = images.batch_maker(data, 30, 0, True)(4)
    assert torch.equal(augmented[2], index) and not torch.equal(augmented[0], x)
