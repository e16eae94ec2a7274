"""This project's boxes behind TF-Agents' own interfaces, for loops that are not this project's."""
