# Sourced by the scripts here: their options, as `--name value` or `--name=value`.

fail() {
    echo "error: $1" >&2
    exit 2
}

# Give the variable of each known option its value, an array another entry; the arguments that are not known become
# the array `rest`: "NAME ..." [ARGUMENT ...]. For --help it prints the comment at the top of the script.
take_options() {
    local known=" $1 " name value
    shift
    rest=()
    while (($#)); do
        if [[ "$1" == --*=* ]]; then
            set -- "${1%%=*}" "${1#*=}" "${@:2}"
        fi
        name="${1#--}" name="${name//-/_}"
        if [[ "$1" == -h || "$1" == --help ]]; then
            sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"
            exit 0
        elif [[ "$1" != --* || "$known" != *" $name "* ]]; then
            rest+=("$1")
            shift
            continue
        fi
        (($# > 1)) || fail "$1 needs a value"
        value="$2"
        shift 2
        if [[ "$(declare -p "$name")" == "declare -a"* ]]; then
            local -n array="$name"
            array+=("$value")
        else
            printf -v "$name" '%s' "$value"
        fi
    done
}
