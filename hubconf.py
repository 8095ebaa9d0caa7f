"""torch.hub: a network from any checkpoint, with its preprocessing.

    network = torch.hub.load("OWNER/REPOSITORY", "student", "run/student.pth")
    features = network(network.transform(image)[None])
"""

dependencies = ["torch", "torchvision", "numpy", "tqdm"]


def student(weights: str, **options: object):  # noqa: ANN201 - torch.hub imports this file before the packages
    """coss.load: ``weights`` is a student, a teacher or any other file that docs/CHECKPOINTS.md lists."""
    import coss
    return coss.load(weights, **options)


teacher = student
