"""Shell completion: verbs and recipe names, without starting Python at every key press."""

from lowprec.recipes import shipped_recipes

VERBS = ("train", "plan", "profile", "recipes", "merge", "doctor", "bench", "ssd", "completion")

_BASH = """_lowprec() {{
    local word=${{COMP_WORDS[COMP_CWORD]}}
    case $COMP_CWORD in
        1) COMPREPLY=($(compgen -W "{verbs}" -- "$word")) ;;
        2) case ${{COMP_WORDS[1]}} in
               train|plan|profile)
                   COMPREPLY=($(compgen -W "{recipes}" -- "$word") $(compgen -f -X '!*.yaml' -- "$word")) ;;
               bench) COMPREPLY=($(compgen -W "linear rotate matmul step plan ssd train" -- "$word")) ;;
               ssd) COMPREPLY=($(compgen -W "clean export" -- "$word")) ;;
               recipes) COMPREPLY=($(compgen -W "ls show cp" -- "$word")) ;;
               completion) COMPREPLY=($(compgen -W "bash zsh" -- "$word")) ;;
               *) COMPREPLY=($(compgen -d -- "$word")) ;;
           esac ;;
        3) [[ ${{COMP_WORDS[1]}} == recipes ]] && COMPREPLY=($(compgen -W "{recipes}" -- "$word")) ;;
    esac
}}
complete -o default -F _lowprec lowprec
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def script(shell: str) -> str:
    """The text to ``eval`` in ``bash`` or ``zsh`` (which reads bash's completions through its own adapter)."""
    text = _BASH.format(verbs=" ".join(VERBS), recipes=" ".join(shipped_recipes()))
    return _ZSH + text if shell == "zsh" else text
