"""The main example: `python -m examples.docked_poses`, about two minutes on two cores."""

from examples.docked_poses._require import DEMO, require

if __name__ == "__main__":
    require(
        *("torch_geometric", "pignet2", "rdkit", "omegaconf", "pandas", "scipy"),
        *("tqdm", "matplotlib"),
        install=DEMO,
    )
    from examples.docked_poses.demo import main

    main()
