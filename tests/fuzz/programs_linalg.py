"""Operators that go through complex numbers, or take a pose's rows for a matrix."""

from tests.fuzz.programs_draft import Draft

__all__ = ["of_matrices", "of_waves"]


def of_waves(d: Draft) -> None:
    """Through complex numbers and back."""
    d.settle(d.pick("m T f", "T m f", "mT f", "m f T"))
    dim, n = d.feature, d.width
    w = f"{d.parameter(n, n)}.to(torch.complex128)"
    half, v = n // 2 + 1, d.parameter(n, n)
    choices = [
        f"torch.fft.fft(x, dim={dim}).abs()",
        f"torch.fft.fft(x, dim={dim}).real",
        f"torch.fft.fft(x, dim={dim}).conj().imag",
        f"torch.fft.ifft(torch.fft.fft(x, dim={dim}).conj() * (1 + 2j), dim={dim}).real",
        f"torch.fft.irfft(torch.fft.rfft(x, dim={dim}).conj(), n={n}, dim={dim})",
        "torch.fft.fft2(x, dim=(-2, -1)).abs()" if d.layout in ("m T f", "m f T") else "x.sin()",
        "torch.complex(x, x.sin()).abs()",
        "torch.view_as_real(torch.complex(x, x.cos()).conj().resolve_conj())[..., 1]",
        "torch.view_as_complex(torch.stack([x, x.sin()], -1)).square().imag",
        "torch.polar(1 + x.square(), x).real",
        "(x * 1j).exp().imag",
        "torch.complex(x, 1 + x).sqrt().real",
        f"x.to(torch.complex128).mul({d.noise(1)} + 1j).conj().resolve_conj().real",
        "torch.conj_physical(torch.complex(x, x * 2)).imag",
        "(torch.complex(x, x) * torch.complex(x, -x).conj()).imag",
    ]
    if d.is_last:
        choices += [
            f"(torch.fft.fft(x).conj() @ {w}).real",
            f"(torch.fft.fft(x) @ {w}.conj()).abs()",
            f"torch.einsum('...i,ij->...j', torch.complex(x, x.sin()).conj(), {w}).imag",
            f"(torch.fft.rfft(x).conj() @ {d.parameter(half, n)}.to(torch.complex128)).real",
            f"(torch.complex(x, x.sin()) @ torch.complex({v}, {d.parameter(n, n)})).abs()",
            f"(torch.fft.fft(x) * torch.fft.fft({d.parameter(n)}).conj()).real",
            f"F.linear(torch.fft.fft(x), {w}.mT.conj()).imag",
            f"((x * 1j).conj() @ {w}).imag",
        ]
    d.set(d.random.choice(choices))


def of_matrices(d: Draft) -> None:
    """Each pose's rows as a matrix."""
    d.settle()
    name, f = d.name("s"), d.width
    eye = f"torch.eye({f}).to(x)"
    d.emit(f"{name} = x.tanh().mT @ x.tanh() / x.shape[1] + {eye} * 1.5")
    d.set(
        d.pick(
            f"torch.linalg.solve({name}, x.mT).mT",
            f"x @ torch.linalg.inv({name})",
            f"x @ torch.linalg.cholesky({name})",
            f"x * torch.linalg.det({name})[:, None, None]",
            f"x + torch.linalg.slogdet({name})[1][:, None, None]",
            f"x * torch.linalg.svdvals({name})[:, None]",
            f"x + torch.linalg.eigvalsh({name})[:, None]",
            f"x @ torch.linalg.qr({name})[1]",
            f"x @ torch.linalg.matrix_exp({name} * 0.1)",
            f"torch.linalg.solve_triangular({name}.tril(), x.mT, upper=False).mT",
            f"torch.cholesky_solve(x.mT, torch.linalg.cholesky({name})).mT",
            f"x @ torch.linalg.matrix_power({name}, 2)",
            f"x * {name}.diagonal(0, 1, 2)[:, None]",
            f"x + {name}.diagonal(0, 1, 2).sum(-1)[:, None, None]",
            f"torch.baddbmm(x, x, {name}, beta=0.5)",
            f"torch.einsum('mij,mtj->mti', {name}, x)",
            "x + torch.cdist(x, x).sum(-1, keepdim=True)",
            "x + torch.cdist(x, x + 1, p=1.0).mean(-1, keepdim=True)",
            "x * x.pow(2).sum((1, 2))[:, None, None]",
            "torch.linalg.cross(x, x.roll(1, -1).sin())" if f == 3 else f"x @ {name}",
            "torch.block_diag(*x).sum(1).view(m, -1)[:, :, None] + x",
            f"x * torch.stack([torch.trace(one) for one in {name}])[:, None, None]",
            "torch.kron(x, x.new_ones(1, 2, 1))",
        )
    )
    d.resized()
